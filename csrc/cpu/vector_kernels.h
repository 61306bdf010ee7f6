// The kernels, in vectors of 16 floats. Each including file compiles this with its own flags and defines
// KVSPN_KERNELS, the name of its table.

#include "cpu/vector.h"

namespace kvspn {
namespace {

// Two columns of a row, for all lanes.
INLINE Words columns(const int16_t* x) {
    int32_t both;
    __builtin_memcpy(&both, x, sizeof both);
    return as<Words>(IVec{} + both);
}

struct Int8 {
    static constexpr int kBits = 8;

    // kDepth columns of a tile: adds their products to the even and odd sums of `Count` rows.
    template <int Count>
    static INLINE void block(const char* weights, const int16_t* x, int64_t stride, IVec (&sums)[Count][2]) {
        for (int i = 0; i < kDepth / 2; ++i) {
            const Words w = widen<Words>((const int8_t*)weights + i * 2 * kLanes);
            for (int r = 0; r < Count; ++r)
                sums[r][i % 2] = dot(w, columns(x + r * stride + 2 * i), sums[r][i % 2]);
        }
    }
};

struct Int4 {
    static constexpr int kBits = 4;

    template <int Count>
    static INLINE void block(const char* weights, const int16_t* x, int64_t stride, IVec (&sums)[Count][2]) {
        const Words all = load<Words>(weights);
        const Words w[4] = {all << 12 >> 12, all << 8 >> 12, all << 4 >> 12, all >> 12};
        for (int i = 0; i < kDepth / 2; ++i)
            for (int r = 0; r < Count; ++r)
                sums[r][i % 2] = dot(w[i], columns(x + r * stride + 2 * i), sums[r][i % 2]);
    }
};

// kLanes outputs of `Count` rows; the order of a sum does not depend on `Count`.
template <class W, int Count>
struct Tile {
    static INLINE void product(const Matrix& m, const Rows& rows, int output, Vec (&y)[Count]) {
        const W* w = (const W*)m.weight + (int64_t)output * m.columns;
        Vec acc[Count][2] = {};
        int c = 0;
        for (; c + 2 <= m.columns; c += 2, w += 2 * kLanes) {
            Vec even, odd;
            widen_two(w, even, odd);
            for (int r = 0; r < Count; ++r) {
                const float* x = rows.x + r * rows.stride + c;
                acc[r][0] = fma(even, fill(x[0]), acc[r][0]);
                acc[r][1] = fma(odd, fill(x[1]), acc[r][1]);
            }
        }
        for (int r = 0; r < Count; ++r) {
            if (c < m.columns) acc[r][0] = fma(widen(w), fill(rows.x[r * rows.stride + c]), acc[r][0]);
            y[r] = acc[r][0] + acc[r][1];
            if (m.scale) y[r] *= load<Vec>(m.scale + output) * kUnit<W>;
        }
    }
};

template <class Format, int Count>
struct IntegerTile {
    static INLINE void product(const Matrix& m, const Rows& rows, int output, Vec (&y)[Count]) {
        const char* w = (const char*)m.weight + (int64_t)output * m.columns * Format::kBits / 8;
        const float* scale = m.scale + (int64_t)output * ((m.columns + m.span - 1) / m.span);
        for (int r = 0; r < Count; ++r) y[r] = Vec{};
        for (int from = 0; from < m.columns; from += m.span, scale += kLanes) {
            const int to = from + m.span < m.columns ? from + m.span : m.columns;
            IVec sums[Count][2] = {};
            for (int c = from; c < to; c += kDepth, w += kDepth * kLanes * Format::kBits / 8)
                Format::template block<Count>(w, rows.quantised + c, rows.quantised_stride, sums);
            for (int r = 0; r < Count; ++r)
                y[r] = fma(convert<Vec>(sums[r][0] + sums[r][1]), load<Vec>(scale), y[r]);
        }
        for (int r = 0; r < Count; ++r) y[r] *= rows.scales[r];
    }
};
template <int Count>
struct Tile<Int8, Count> : IntegerTile<Int8, Count> {};
template <int Count>
struct Tile<Int4, Count> : IntegerTile<Int4, Count> {};

template <class W, int Count>
void linear_rows(const Matrix& m, const Rows& rows, int first, int last, float* y, int64_t y_stride,
                 bool accumulate) {
    for (int output = first / kLanes * kLanes; output < last; output += kLanes) {
        Vec products[Count];
        Tile<W, Count>::product(m, rows, output, products);
        const int from = first > output ? first - output : 0;
        const int to = last - output < kLanes ? last - output : kLanes;
        for (int r = 0; r < Count; ++r) {
            if (m.bias) products[r] += load<Vec>(m.bias + output);
            float* out = y + r * y_stride + output;
            if (to - from == kLanes) {
                store(out, accumulate ? load<Vec>(out) + products[r] : products[r]);
            } else {
                float each[kLanes];
                store(each, products[r]);
                for (int o = from; o < to; ++o) out[o] = accumulate ? out[o] + each[o] : each[o];
            }
        }
    }
}

template <int N>
using Number = std::integral_constant<int, N>;

// Up to four rows share one reading of the weights; more go over them in strips that stay in the cache:
// work(how many rows, the first, outputs from, to).
template <class Work>
INLINE void in_blocks(int rows, int first, int last, const Work& work) {
    constexpr int kStrip = 4 * kLanes;
    for (int from = first; from < last; from += kStrip) {
        const int to = from + kStrip < last ? from + kStrip : last;
        for (int r = 0; r < rows; r += 4) {
            switch (rows - r) {
                case 1:
                    work(Number<1>(), r, from, to);
                    break;
                case 2:
                    work(Number<2>(), r, from, to);
                    break;
                case 3:
                    work(Number<3>(), r, from, to);
                    break;
                default:
                    work(Number<4>(), r, from, to);
            }
        }
    }
}

template <class W>
void linear_of(const Matrix& m, const Rows& rows, int first, int last, float* y, int64_t y_stride,
               bool accumulate) {
    in_blocks(rows.count, first, last, [&](auto count, int r, int from, int to) {
        linear_rows<W, count.value>(m, rows.from(r), from, to, y + r * y_stride, y_stride, accumulate);
    });
}

void linear(const Matrix& m, const Rows& rows, int first, int last, float* y, int64_t y_stride,
            bool accumulate) {
    switch (m.dtype) {
        case Dtype::bf16:
            return linear_of<Bf16>(m, rows, first, last, y, y_stride, accumulate);
        case Dtype::fp16:
            return linear_of<Fp16>(m, rows, first, last, y, y_stride, accumulate);
        case Dtype::int8:
            return linear_of<Int8>(m, rows, first, last, y, y_stride, accumulate);
        case Dtype::int4:
            return linear_of<Int4>(m, rows, first, last, y, y_stride, accumulate);
        case Dtype::fp8:
            return linear_of<Fp8>(m, rows, first, last, y, y_stride, accumulate);
        default:
            return linear_of<float>(m, rows, first, last, y, y_stride, accumulate);
    }
}

struct Nibbles {  // two columns of int4
    uint8_t bits;
};
struct OddNibbles : Nibbles {};  // whose groups may begin with the second

// Columns c .. c + 16 of a row; or `count` < 16, and zeros.
template <class W>
INLINE Vec load_columns(const W* row, int c) {
    return widen(row + c);
}
template <class W>
INLINE Vec load_columns(const W* row, int c, int count) {
    return load_part(row + c, count);
}
INLINE Vec load_columns(const Nibbles* row, int c) {
    typedef int8_t Bytes16 __attribute__((vector_size(16)));
    typedef uint64_t Halves __attribute__((vector_size(16)));
    uint64_t bits;
    __builtin_memcpy(&bits, row + c / 2, sizeof bits);
    const Bytes16 even_odd = (Bytes16)(Halves{bits, bits >> 4} & 0x0f0f0f0f0f0f0f0f);
    const Bytes16 values =
        shuffle<0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15>(even_odd, even_odd) - 8;
    return widen((const Byte*)&values);
}
INLINE Vec load_columns(const Nibbles* row, int c, int count) {
    int8_t values[kLanes] = {};
    for (int i = 0; i < count; ++i) values[i] = (int8_t)((row[(c + i) / 2].bits >> (c + i) % 2 * 4 & 15) - 8);
    return widen((const Byte*)values);
}
INLINE Vec load_columns(const OddNibbles* row, int c) { return load_columns((const Nibbles*)row, c, kLanes); }
INLINE Vec load_columns(const OddNibbles* row, int c, int count) {
    return load_columns((const Nibbles*)row, c, count);
}

#define UNROLL _Pragma("GCC unroll 4")  // or sums stay in memory
#define UNROLL16 _Pragma("GCC unroll 16")

// `Outputs` of `Count` rows; the order of a sum depends on neither.
template <class W, int Outputs, int Count>
INLINE void dots(const RowMatrix& m, const float* x, int64_t x_stride, int output, float* y,
                 int64_t y_stride) {
    const W* rows[Outputs];
    UNROLL
    for (int o = 0; o < Outputs; ++o) rows[o] = (const W*)m.weight + (output + o) * m.stride;
    constexpr int kColumns = std::is_base_of_v<Nibbles, W> ? 2 : 1;  // of an element
    const W* next = rows[0] + Outputs * m.stride;  // rows are too short for the processor to foresee the next
    const int span = m.inputs / m.groups;
    Vec total[Outputs][Count] = {};
    for (int g = 0; g < m.groups; ++g) {
        Vec acc[Outputs][Count] = {};
        int c = g * span;
        const int end = c + span;
        for (; c + kLanes <= end; c += kLanes) {
            Vec in[Count];
            UNROLL
            for (int r = 0; r < Count; ++r) in[r] = load<Vec>(x + r * x_stride + c);
            UNROLL
            for (int o = 0; o < Outputs; ++o) {
                const Vec w = load_columns(rows[o], c);
                __builtin_prefetch(next + o * m.stride + c / kColumns);
                UNROLL
                for (int r = 0; r < Count; ++r) acc[o][r] = fma(w, in[r], acc[o][r]);
            }
        }
        UNROLL
        for (int o = 0; o < Outputs; ++o) {
            if (c == end) break;
            const Vec w = load_columns(rows[o], c, end - c);
            UNROLL
            for (int r = 0; r < Count; ++r)
                acc[o][r] = fma(w, load_part(x + r * x_stride + c, end - c), acc[o][r]);
        }
        UNROLL
        for (int o = 0; o < Outputs; ++o) {
            const float scale = m.scale ? m.scale[(output + o) * m.scale_stride + g] * kUnit<W> : 1.0f;
            UNROLL
            for (int r = 0; r < Count; ++r) total[o][r] = fma(acc[o][r], fill(scale), total[o][r]);
        }
    }
    UNROLL
    for (int o = 0; o < Outputs; ++o) {
        UNROLL
        for (int r = 0; r < Count; ++r) y[r * y_stride + output + o] = sum(total[o][r]);
    }
}

template <class W, int Count>
void linear_by_rows_few(const RowMatrix& m, const float* x, int64_t x_stride, int first, int last, float* y,
                        int64_t y_stride) {
    constexpr int kOutputs = Count > 2 ? 2 : 4;  // as many sums as there are registers
    int output = first;
    for (; output + kOutputs <= last; output += kOutputs)
        dots<W, kOutputs, Count>(m, x, x_stride, output, y, y_stride);
    for (; output < last; ++output) dots<W, 1, Count>(m, x, x_stride, output, y, y_stride);
}

template <class W>
void linear_by_rows_of(const RowMatrix& m, const float* x, int64_t x_stride, int count, int first, int last,
                       float* y, int64_t y_stride) {
    in_blocks(count, first, last, [&](auto few, int r, int from, int to) {
        linear_by_rows_few<W, few.value>(m, x + r * x_stride, x_stride, from, to, y + r * y_stride, y_stride);
    });
}

void linear_by_rows(const RowMatrix& m, const float* x, int64_t x_stride, int count, int first, int last,
                    float* y, int64_t y_stride) {
    switch (m.dtype) {
        case Dtype::bf16:
            return linear_by_rows_of<Bf16>(m, x, x_stride, count, first, last, y, y_stride);
        case Dtype::fp16:
            return linear_by_rows_of<Fp16>(m, x, x_stride, count, first, last, y, y_stride);
        case Dtype::int8:
            return linear_by_rows_of<Byte>(m, x, x_stride, count, first, last, y, y_stride);
        case Dtype::int4:
            if (m.inputs / m.groups % 2)
                return linear_by_rows_of<OddNibbles>(m, x, x_stride, count, first, last, y, y_stride);
            return linear_by_rows_of<Nibbles>(m, x, x_stride, count, first, last, y, y_stride);
        case Dtype::fp8:
            return linear_by_rows_of<Fp8>(m, x, x_stride, count, first, last, y, y_stride);
        default:
            return linear_by_rows_of<float>(m, x, x_stride, count, first, last, y, y_stride);
    }
}

// x [count] -> integers of at most `limit`; returns the scale.
template <class Integer>
INLINE float quantise_to(const float* x, int count, float limit, Integer* out) {
    Vec largest = {}, nan = {};
    for (int c = 0; c < count; c += kLanes) {
        const Vec v = load_some(x + c, count - c);
        largest = larger(largest, larger(v, -v));
        nan += v - v;  // 0, or NaN, which then goes into every output
    }
    const float most = largest_of(largest);
    const float inverse = most > 0.0f ? limit / most : 0.0f;
    for (int c = 0; c < count; c += kLanes) {
        // Rounded to nearest by the addition of 1.5 * 2^23.
        const Vec v = load_some(x + c, count - c) * inverse + 12582912.0f - 12582912.0f;
        int32_t integers[kLanes];
        store(integers, convert<IVec>(v));
        if (count - c >= kLanes)
            for (int i = 0; i < kLanes; ++i) out[c + i] = (Integer)integers[i];
        else
            for (int i = 0; c + i < count; ++i) out[c + i] = (Integer)integers[i];
    }
    return most / limit + sum(nan);
}

float quantise(const float* x, int count, int padded, int16_t* out) {
    for (int c = count; c < padded; ++c) out[c] = 0;
    return quantise_to(x, count, 32767.0f, out);
}

float quantise_int8(const float* x, int count, int8_t* out) { return quantise_to(x, count, 127.0f, out); }

void narrow(Dtype dtype, const float* x, int count, void* out) {
    if (dtype == Dtype::fp32) {
        for (int c = 0; c < count; ++c) ((float*)out)[c] = x[c];
    } else if (dtype == Dtype::fp16) {
        for (int c = 0; c < count; c += kLanes) {
            Fp16 part[kLanes];
            narrow(load_some(x + c, count - c), part);
            const int length = count - c < kLanes ? count - c : kLanes;
            __builtin_memcpy((Fp16*)out + c, part, length * sizeof(Fp16));
        }
    } else {
        for (int c = 0; c < count; ++c) {
            uint32_t bits;
            __builtin_memcpy(&bits, x + c, sizeof bits);
            const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            ((uint16_t*)out)[c] = (uint16_t)(x[c] == x[c] ? rounded : 0x7fc0);
        }
    }
}

// One layer's keys and values, or the tail's.
template <class T>
struct Segment {
    const T *keys, *values;
    const float *key_scales, *value_scales;
    int64_t stride;
    int longest, scores;  // positions that any query sees; where their scores begin

    INLINE Segment(const Attention& a, int i, int longest_layer)
        : keys((const T*)a.keys + i * a.layer_stride),
          values((const T*)a.values + i * a.layer_stride),
          key_scales(a.key_scales + i * a.scale_layer_stride),
          value_scales(a.value_scales + i * a.scale_layer_stride),
          stride(a.stride),
          longest(longest_layer),
          scores(i * padded(longest_layer)) {
        if (i < a.layers) return;
        keys = (const T*)a.tail_keys, values = (const T*)a.tail_values;
        stride = a.tail_stride, longest = a.tail_length;
    }
    static INLINE int padded(int length) { return (length + kLanes - 1) / kLanes * kLanes; }
};

// Columns c .. c + 16 of the output: the values, weighed by the scores. Or, Vectors > 1, as many times 16.
template <class T, int Queries, int Vectors>
INLINE void blend(const Attention& a, int longest, int total, const float* inverse, int c) {
    Vec acc[Queries][Vectors] = {};
    int shortest = longest;
    for (int i = 0; i < Queries; ++i) shortest = a.lengths[i] < shortest ? a.lengths[i] : shortest;
    for (int s = 0; s <= a.layers; ++s) {
        const Segment<T> segment(a, s, longest);
        const float* scores = a.scores + segment.scores;
        // A value that some queries do not see must not reach them: it may be NaN, which 0 does not stop.
        const int seen_by_all = s < a.layers ? shortest : segment.longest;
        const T* value = segment.values + c;
        const auto add = [&](int t, bool by_all) {
            Vec v[Vectors];
            if constexpr (Vectors == 1)
                v[0] = load_some(value, a.width - c);
            else
                for (int n = 0; n < Vectors; n += 2) widen_two(value + n * kLanes, v[n], v[n + 1]);
            for (int i = 0; i < Queries; ++i) {
                if (!by_all && t >= a.lengths[i]) continue;
                const Vec p = fill(scores[(int64_t)i * total + t]);
                for (int n = 0; n < Vectors; ++n) acc[i][n] = fma(v[n], p, acc[i][n]);
            }
            value += segment.stride;
        };
        for (int t = 0; t < seen_by_all; ++t) add(t, true);
        for (int t = seen_by_all; t < segment.longest; ++t) add(t, false);
    }
    for (int i = 0; i < Queries; ++i) {
        float* out = a.out[i] + c;
        if constexpr (Vectors == 1)
            store_some(out, acc[i][0] * inverse[i], a.width - c);
        else
            for (int n = 0; n < Vectors; n += 2)
                store_two<T>(out + n * kLanes, acc[i][n] * inverse[i], acc[i][n + 1] * inverse[i]);
    }
}

// Keys of kLanes positions, or of the first of them, times the queries, to be summed across each vector.
template <class T, int Queries, int Vectors>
INLINE void multiply(const Vec (&q)[Queries][Vectors], const T* key, int64_t stride, int positions,
                     Vec (&products)[Queries][kLanes]) {
    UNROLL16
    for (int j = 0; j < kLanes; ++j) {
        Vec acc[Queries] = {};
        if (j < positions) {
            UNROLL16
            for (int v = 0; v < Vectors; v += 2) {
                Vec first, second;
                widen_two(key + j * stride + v * kLanes, first, second);
                UNROLL16
                for (int i = 0; i < Queries; ++i)
                    acc[i] = fma(second, q[i][v + 1], fma(first, q[i][v], acc[i]));
            }
        }
        UNROLL16
        for (int i = 0; i < Queries; ++i) products[i][j] = acc[i];
    }
}

// The same for any width.
template <class T, int Queries>
INLINE void multiply_any(const Attention& a, const T* key, int64_t stride, int positions,
                         Vec (&products)[Queries][kLanes]) {
    for (int j = 0; j < kLanes; ++j, key += stride) {
        Vec acc[Queries] = {};
        for (int c = 0; c < a.width && j < positions; c += kLanes) {
            const Vec k = load_some(key + c, a.width - c);
            for (int i = 0; i < Queries; ++i) acc[i] = fma(k, load_some(a.q[i] + c, a.width - c), acc[i]);
        }
        for (int i = 0; i < Queries; ++i) products[i][j] = acc[i];
    }
}

// Width: the most usual one, known to the compiler; or 0.
template <class T, int Queries, int Width>
void attend_queries(const Attention& a) {
    int longest = 0;
    for (int i = 0; i < Queries; ++i) longest = a.lengths[i] > longest ? a.lengths[i] : longest;
    const int total = Segment<T>::padded(longest) * a.layers + Segment<T>::padded(a.tail_length);
    constexpr int kVectors = Width ? Width / kLanes : 2;
    Vec q[Queries][kVectors];
    for (int i = 0; Width && i < Queries; ++i)
        for (int v = 0; v < kVectors; v += 2) load_two<T>(a.q[i] + v * kLanes, q[i][v], q[i][v + 1]);
    Vec maximum[Queries];
    for (int i = 0; i < Queries; ++i) maximum[i] = fill(-__builtin_inff());
    for (int s = 0; s <= a.layers; ++s) {
        const Segment<T> segment(a, s, longest);
        for (int t = 0; t < segment.longest; t += kLanes) {
            Vec products[Queries][kLanes];
            const T* key = segment.keys + t * segment.stride;
            const int positions = segment.longest - t;
            if (!Width)
                multiply_any(a, key, segment.stride, positions, products);
            else if (positions >= kLanes)
                multiply(q, key, segment.stride, kLanes, products);
            else
                multiply(q, key, segment.stride, positions, products);
            for (int i = 0; i < Queries; ++i) {
                const int length = s < a.layers ? a.lengths[i] : a.tail_length;
                Vec score = sums(products[i]) * a.scale;
                if (a.key_scales) score *= load_some(segment.key_scales + t, segment.longest - t);
                score = select(lanes() + t < length, score, fill(-__builtin_inff()));
                store(a.scores + (int64_t)i * total + segment.scores + t, score);
                maximum[i] = larger(maximum[i], score);
            }
        }
    }
    float inverse[Queries];
    for (int i = 0; i < Queries; ++i) {
        float top = largest_of(maximum[i]);
        const bool keys = a.lengths[i] || a.tail_length;
        if (!keys) top = 0.0f;  // all scores are -inf
        float* scores = a.scores + (int64_t)i * total;
        Vec denominator = {};
        for (int t = 0; t < total; t += kLanes) {
            Vec p = exponential(load<Vec>(scores + t) - top);
            store(scores + t, p);
            denominator += p;
        }
        inverse[i] = keys ? 1.0f / sum(denominator) : 0.0f;
        for (int s = 0; a.value_scales && s < a.layers; ++s) {
            const Segment<T> segment(a, s, longest);
            for (int t = 0; t < longest; t += kLanes) {
                float* p = scores + segment.scores + t;
                store(p, load<Vec>(p) * load_some(segment.value_scales + t, longest - t));
            }
        }
    }
    int c = 0;
    for (; c + 4 * kLanes <= a.width; c += 4 * kLanes) blend<T, Queries, 4>(a, longest, total, inverse, c);
    for (; c < a.width; c += kLanes) blend<T, Queries, 1>(a, longest, total, inverse, c);
}

template <class T, int Width>
void attend_width(const Attention& a) {
    switch (a.queries) {
        case 1:
            return attend_queries<T, 1, Width>(a);
        case 2:
            return attend_queries<T, 2, Width>(a);
        case 3:
            return attend_queries<T, 3, Width>(a);
        default:
            return attend_queries<T, 4, Width>(a);
    }
}

template <class T>
void attend_of(const Attention& a) {
    return a.width == 64 ? attend_width<T, 64>(a) : attend_width<T, 0>(a);
}

void attend(const Attention& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return attend_of<Bf16>(a);
        case Dtype::fp16:
            return attend_of<Fp16>(a);
        case Dtype::int8:
            return attend_of<Byte>(a);
        default:
            return attend_of<float>(a);
    }
}

void layer_norm(const float* x, const float* weight, const float* bias, int width, float eps, float* y) {
    Vec total = {};
    for (int c = 0; c < width; c += kLanes) total += load_some(x + c, width - c);
    const float mean = sum(total) / (float)width;
    Vec squares = {};
    for (int c = 0; c < width; c += kLanes) {
        Vec centred = select(lanes() < width - c, load_some(x + c, width - c) - mean, Vec{});
        squares = fma(centred, centred, squares);
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + eps);
    for (int c = 0; c < width; ++c) y[c] = (x[c] - mean) * inverse * weight[c] + bias[c];
}

// x * Phi(x), with erf after Abramowitz and Stegun 7.1.26 (error under 1.5e-7).
void rms_norm(const float* x, const float* weight, int width, float eps, float* y) {
    Vec squares = {};
    for (int c = 0; c < width; c += kLanes) {
        Vec v = load_some(x + c, width - c);
        squares = fma(v, v, squares);
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + eps);
    for (int c = 0; c < width; ++c) y[c] = x[c] * inverse * weight[c];
}

void swiglu(float* gate, const float* x, int count) {
    for (int c = 0; c < count; c += kLanes) {
        Vec v = load_some(gate + c, count - c);
        Vec small = exponential(-larger(v, -v));  // at most 1, whatever the sign
        Vec sigmoid = select(v < 0.0f, small, fill(1.0f)) / (1.0f + small);
        store_some(gate + c, v * sigmoid * load_some(x + c, count - c), count - c);
    }
}

void gelu(float* x, int count) {
    for (int c = 0; c < count; c += kLanes) {
        Vec v = load_some(x + c, count - c);
        Vec z = v * 0.70710678f;
        Vec size = larger(z, -z);
        Vec t = 1.0f / (1.0f + 0.3275911f * size);
        Vec p = fill(1.061405429f);
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        Vec erf = 1.0f - p * t * exponential(-size * size);
        Vec y = 0.5f * v * (1.0f + select(z < 0.0f, -erf, erf));
        store_some(x + c, y, count - c);
    }
}

void judge(const float* logits, const float* mask, int first, int count, Best& best) {
    const Vec draft_value = fill(best.draft_value);
    Vec most = fill(-__builtin_inff());
    IVec at = lanes(), above = {}, numbers = most == most;
    for (int c = 0; c < count; c += kLanes) {
        Vec v = load_some(logits + c, count - c);
        if (mask) v += load_some(mask + c, count - c);
        const IVec there = lanes() < count - c;
        numbers = numbers & (v == v);
        v = select(there, v, fill(-__builtin_inff()));
        const IVec better = v > most;
        most = select(better, v, most);
        at = select(better, lanes() + c, at);
        above = above -
                (there & ((v > draft_value) | ((v == draft_value) & (lanes() + (first + c) < best.draft))));
    }
    float values[kLanes];
    int32_t places[kLanes], counts[kLanes], number[kLanes];
    store(values, most), store(places, at), store(counts, above), store(number, numbers);
    for (int i = 0; i < kLanes; ++i) {
        const int32_t id = first + places[i];
        if (values[i] > best.value || (values[i] == best.value && id < best.id))
            best.value = values[i], best.id = id;
        if (best.draft >= 0) best.above += counts[i];
        best.nan |= !number[i];
    }
}

void disturb(const float* logits, const RowRule& rule, int32_t index, const int32_t* ids, int first,
             int count, float* out) {
    for (int c = 0; c < count; c += kLanes) {
        const int left = count - c < kLanes ? count - c : kLanes;
        int32_t tokens[kLanes];
        for (int i = 0; i < kLanes; ++i) tokens[i] = !ids ? first + c + i : i < left ? ids[c + i] : 0;
        float numbers[kLanes];
        for (int i = 0; i < kLanes; ++i)
            numbers[i] = uniform(rule.seed[0], rule.seed[1], uint32_t(index), uint32_t(tokens[i]));
        const Vec noise = -logarithm(-logarithm(load<Vec>(numbers)));
        store_some(out + c, load_some(logits + c, left) / rule.temperature + noise, left);
    }
}

Partition partition(const float* logits, int count) {
    const Vec none = fill(-__builtin_inff());
    Vec largest = none;
    for (int c = 0; c < count; c += kLanes)
        largest = larger(select(lanes() < count - c, load_some(logits + c, count - c), none), largest);
    Partition made{largest_of(largest), 0};
    if (made.largest == -__builtin_inff()) return made;
    Vec total{};
    for (int c = 0; c < count; c += kLanes) {
        const Vec v = select(lanes() < count - c, load_some(logits + c, count - c), none);
        total += exponential(v - made.largest);
    }
    made.sum = sum(total);
    return made;
}

}  // namespace

extern const Kernels KVSPN_KERNELS;
const Kernels KVSPN_KERNELS = {
    KVSPN_KERNELS_NAME, linear,   linear_by_rows, quantise, quantise_int8, narrow,  attend,
    layer_norm,         rms_norm, gelu,           swiglu,   judge,         disturb, partition};

}  // namespace kvspn
