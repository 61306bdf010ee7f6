// The encoder's kernels, in vectors of 16 floats. Each including file compiles this with its own flags and
// defines KVSPN_ENCODER, the table, and KVSPN_ENCODER_NAME.
//
// What is left to an instruction set is how a word of an operand meets a vector of weights: see InFp32,
// InBf16 and InInt8. Where there are AMX tiles, 32 rows meet two tiles of weights at once.

#include "cpu/encoder_kernels.h"
#include "cpu/vector.h"

namespace kvspn {
namespace {

#define UNROLL _Pragma("GCC unroll 16")  // or sums stay in memory

// Rows and tiles of outputs whose sums fit into the registers, and rows that a product takes at once.
#if defined(__AVX512F__)
constexpr int kRows = 8, kTiles = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 4, kTiles = 1;
#else
constexpr int kRows = 2, kTiles = 1;
#endif
#if defined(__AMX_TILE__)
constexpr int kTogether = 32;
#else
constexpr int kTogether = kRows;
#endif
constexpr int kDeep = 256;  // words whose weights of two tiles stay in the first cache

template <class T>
INLINE T at(const char* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

// What vector.h has for every instruction set, in fewer instructions where there are some.
INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return larger(a, b);
#endif
}
INLINE float maximum_of(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    return largest_of(v);
#endif
}
// To 14 bits at least.
INLINE Vec inverse_of(Vec v) {
#if defined(__AVX512F__)
    return (Vec)_mm512_rcp14_ps((__m512)v);
#else
    return 1.0f / v;
#endif
}
// A word in every lane; `fill` adds it to 0.
INLINE Vec spread(const char* word) { return as<Vec>(IVec{} + at<int32_t>(word)); }

// The nearest bf16, in the low half of each lane.
INLINE IVec round_to_bf16(Vec v) {
    const IVec bits = as<IVec>(v);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}

// kPer: elements of a word. kVector: bytes of the weights that a word meets in a tile, kPer of each output.
// put: 32 floats, or 16 integers, -> an operand.
struct InFp32 {
    typedef Vec Sum;
    typedef Vec Weight;
    static constexpr int kPer = 1, kVector = 64;
    static INLINE Weight load_weight(const char* p) { return load<Vec>(p); }
    static INLINE Sum add(Sum sum, Weight w, const char* word) { return fma(w, spread(word), sum); }
    static INLINE void put(Vec a, Vec b, char* out) { store(out, a), store(out + 64, b); }
};

INLINE uint16_t bf16_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct InBf16 {
#if defined(__AVX512BF16__)
    typedef Vec Sum;
    typedef __m512bh Weight;
    static constexpr int kPer = 2, kVector = 64;
    static INLINE Weight load_weight(const char* p) { return (__m512bh)load<__m512i>(p); }
    static INLINE Sum add(Sum sum, Weight w, const char* word) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(at<int32_t>(word)));
    }
    static INLINE void put(Vec a, Vec b, char* out) {
        store(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
#else
    // Operands stay floats; weights are widened on their way into a register.
    typedef Vec Sum;
    typedef Vec Weight;
    static constexpr int kPer = 1, kVector = 32;
    static INLINE Weight load_weight(const char* p) { return widen((const Bf16*)p); }
    static INLINE Sum add(Sum sum, Weight w, const char* word) { return InFp32::add(sum, w, word); }
    static INLINE void put(Vec a, Vec b, char* out) { InFp32::put(a, b, out); }
#endif
};

struct InInt8 {
    typedef IVec Sum;
#if defined(__AVX512VNNI__)
    typedef __m512i Weight;
    static constexpr int kPer = 4, kVector = 64;
    static INLINE Weight load_weight(const char* p) { return load<__m512i>(p); }
#if defined(__AMX_TILE__)
    static constexpr int kZero = 0;  // tiles have signed operands
    static INLINE Sum add(Sum sum, Weight, const char*) { return sum; }
#else
    static constexpr int kZero = 128;
    static INLINE Sum add(Sum sum, Weight w, const char* word) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(at<int32_t>(word)), w);
    }
#endif
    static INLINE void put(IVec v, char* out) {
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)v));
    }
#else
    // Operands are int16, weights widened to them.
    typedef Words Weight;
    static constexpr int kPer = 2, kVector = 32, kZero = 0;
    static INLINE Weight load_weight(const char* p) { return widen<Words>((const int8_t*)p); }
    static INLINE Sum add(Sum sum, Weight w, const char* word) {
        return dot(w, as<Words>(IVec{} + at<int32_t>(word)), sum);
    }
    static INLINE void put(IVec v, char* out) {
        int32_t each[kLanes];
        store(each, v);
        for (int i = 0; i < kLanes; ++i) ((int16_t*)out)[i] = (int16_t)each[i];
    }
#endif
};

template <class F>
constexpr bool kIsBytes = std::is_same_v<F, InInt8>;

template <class F>
constexpr int words_of(int inputs) {
    return pad((inputs + F::kPer - 1) / F::kPer, 16);
}

// `count` floats -> an operand; returns what it is to be multiplied with.
template <class F>
INLINE float make_operand(const float* x, int count, char* out) {
    const int columns = words_of<F>(count) * F::kPer;  // a multiple of 16
    if constexpr (kIsBytes<F>) {
        Vec most = {};
        int c = 0;
        for (; c + kLanes <= count; c += kLanes) {
            const Vec v = load<Vec>(x + c);
            most = maximum(most, maximum(v, -v));
        }
        if (c < count) {
            const Vec v = load_some(x + c, count - c);
            most = maximum(most, maximum(v, -v));
        }
        const float largest = maximum_of(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        for (c = 0; c < columns; c += kLanes) {
            const Vec v = c < count ? load_some(x + c, count - c) : Vec{};
            // Added to 1.5 * 2^23, a float has the nearest integer in its lowest bits.
            const IVec rounded = as<IVec>(v * inverse + 12582912.0f) - 0x4b400000;
            F::put(rounded + F::kZero, out + c * 4 / F::kPer);
        }
        return largest / 127.0f;
    } else {
        for (int c = 0; c < columns; c += 2 * kLanes) {
            const int left = count - c;
            const Vec a = left > 0 ? load_some(x + c, left) : Vec{};
            const Vec b = left > kLanes ? load_some(x + c + kLanes, left - kLanes) : Vec{};
            F::put(a, b, out + c * 4 / F::kPer);
        }
        return 1;
    }
}

// kRows operands with kTiles tiles of weights: sums [kRows, kTiles * kLanes], from what is there or from 0.
template <class F>
INLINE void product(const char* a, int64_t a_stride, const char* weight, int64_t tile, int words, char* out,
                    int64_t out_stride, bool accumulate) {
    typedef typename F::Sum Sum;
    Sum sums[kRows][kTiles];
    UNROLL
    for (int r = 0; r < kRows; ++r) {
        UNROLL
        for (int t = 0; t < kTiles; ++t)
            sums[r][t] = accumulate ? load<Sum>(out + r * out_stride + t * 64) : Sum{};
    }
    for (int i = 0; i < words; ++i) {
        typename F::Weight w[kTiles];
        UNROLL
        for (int t = 0; t < kTiles; ++t) w[t] = F::load_weight(weight + t * tile + int64_t(i) * F::kVector);
        UNROLL
        for (int r = 0; r < kRows; ++r) {
            UNROLL
            for (int t = 0; t < kTiles; ++t) sums[r][t] = F::add(sums[r][t], w[t], a + r * a_stride + i * 4);
        }
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) {
        UNROLL
        for (int t = 0; t < kTiles; ++t) store(out + r * out_stride + t * 64, sums[r][t]);
    }
}

#if defined(__AMX_TILE__)
struct TileConfig {  // eight tiles of 16 rows of 64 bytes
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct Tiles {
    Tiles() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

#define KVSPN_TILES(dot)                                     \
    for (int i = 0; i < words; i += 16) {                    \
        _tile_loadd(4, a + i * 4, a_stride);                 \
        _tile_loadd(5, a + 16 * a_stride + i * 4, a_stride); \
        _tile_loadd(6, weight + int64_t(i) * 64, 64);        \
        dot(0, 4, 6);                                        \
        dot(2, 5, 6);                                        \
        _tile_loadd(7, weight + tile + int64_t(i) * 64, 64); \
        dot(1, 4, 7);                                        \
        dot(3, 5, 7);                                        \
    }

template <class F>
INLINE void tiled_product(const char* a, int64_t a_stride, const char* weight, int64_t tile, int words,
                          char* out, int64_t out_stride, bool accumulate) {
    char* below = out + 16 * out_stride;
    if (accumulate) {
        _tile_loadd(0, out, out_stride);
        _tile_loadd(1, out + 64, out_stride);
        _tile_loadd(2, below, out_stride);
        _tile_loadd(3, below + 64, out_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    if constexpr (kIsBytes<F>) {
        KVSPN_TILES(_tile_dpbssd)
    } else {
        KVSPN_TILES(_tile_dpbf16ps)
    }
    _tile_stored(0, out, out_stride);
    _tile_stored(1, out + 64, out_stride);
    _tile_stored(2, below, out_stride);
    _tile_stored(3, below + 64, out_stride);
}
#else
struct Tiles {
    ~Tiles() {}
};
#endif

// `rows` operands, rounded up to kTogether, with two tiles of weights.
template <class F>
INLINE void products(const char* a, int64_t a_stride, int rows, const char* weight, int64_t tile, int words,
                     char* out, int64_t out_stride, bool accumulate) {
#if defined(__AMX_TILE__)
    if constexpr (!std::is_same_v<F, InFp32>) {
        for (int r = 0; r < rows; r += kTogether)
            tiled_product<F>(a + r * a_stride, a_stride, weight, tile, words, out + r * out_stride,
                             out_stride, accumulate);
        return;
    }
#endif
    for (int t = 0; t < 2; t += kTiles)
        for (int r = 0; r < rows; r += kRows)
            product<F>(a + r * a_stride, a_stride, weight + t * tile, tile, words,
                       out + r * out_stride + t * 64, out_stride, accumulate);
}

// 2^x for x <= 0; 2^-60 for all below -60, which is nothing beside the 1 of a row's largest score, and whose
// products are no subnormal numbers, which cost a processor a hundred cycles each. Relative error 2e-7,
// coarse: 5e-5, far below that of a bf16.
template <bool Coarse>
INLINE Vec power_of_two(Vec x) {
    const Vec bounded = maximum(x, fill(-60.0f));
    const Vec shifted = bounded + 12582912.0f;
    const Vec f = bounded - (shifted - 12582912.0f);
    Vec p = fill(Coarse ? 9.618129108e-3f : 1.540353039e-4f);
    if constexpr (!Coarse) {
        p = fma(p, f, fill(1.333355815e-3f));
        p = fma(p, f, fill(9.618129108e-3f));
    }
    p = fma(p, f, fill(5.550410866e-2f));
    p = fma(p, f, fill(2.402265070e-1f));
    p = fma(p, f, fill(6.931471806e-1f));
    p = fma(p, f, fill(1.0f));
    return as<Vec>(as<IVec>(p) + (as<IVec>(shifted) << 23));
}

// x * Phi(x): of a negative x, Phi is half of what Abramowitz and Stegun 7.1.26 has for 1 - erf (error under
// 1.5e-7; coarse: 1e-4).
template <bool Coarse>
INLINE Vec gelu_of(Vec x) {
    const Vec size = maximum(x, -x);
    const Vec bottom = fma(size, fill(0.3275911f * 0.70710678f), fill(1.0f));
    const Vec t = Coarse ? inverse_of(bottom) : 1.0f / bottom;
    Vec p = fill(0.5f * 1.061405429f);
    p = fma(p, t, fill(0.5f * -1.453152027f));
    p = fma(p, t, fill(0.5f * 1.421413741f));
    p = fma(p, t, fill(0.5f * -0.284496736f));
    p = fma(p, t, fill(0.5f * 0.254829592f));
    const Vec tail = p * t * power_of_two<Coarse>(x * x * (-0.5f * 1.44269504f));
    return maximum(x, Vec{}) - size * tail;
}

template <class F>
void linear_of(const LinearBlock& b) {
    const BlockMatrix& m = *b.matrix;
    const int words = words_of<F>(m.inputs), together = pad(b.rows, kTogether);
    const int64_t stride = operand_stride(words), tile = int64_t(words) * F::kVector;
    float scales[kBlock];
    for (int r = 0; r < b.rows; ++r)
        scales[r] = make_operand<F>(b.x + r * b.x_stride, m.inputs, b.operand + r * stride);
    for (int r = b.rows; r < together; ++r) __builtin_memset(b.operand + r * stride, 0, stride);
    const Tiles tiles;
    alignas(64) char sums[kBlock * 2 * 64];
    for (int output = 0; output < m.outputs; output += kTwoTiles) {
        const char* weight = (const char*)m.weight + output / kLanes * tile;
        for (int i = 0; i < words; i += kDeep)
            products<F>(b.operand + i * 4, stride, together, weight + int64_t(i) * F::kVector, tile,
                        words - i < kDeep ? words - i : kDeep, sums, 2 * 64, i > 0);
        for (int at = output; at < output + kTwoTiles && at < m.outputs; at += kLanes) {
            const int left = m.outputs - at;
            const Vec bias = load<Vec>(m.bias + at);
            for (int r = 0; r < b.rows; ++r) {
                const char* sum = sums + r * 2 * 64 + (at - output) / kLanes * 64;
                Vec v;
                if constexpr (kIsBytes<F>) {
                    const IVec whole = load<IVec>(sum) - load<IVec>(m.offset + at);
                    v = fma(convert<Vec>(whole), load<Vec>(m.scale + at) * scales[r], bias);
                } else {
                    v = load<Vec>(sum) + bias;
                }
                if (b.gelu) v = gelu_of<!std::is_same_v<F, InFp32>>(v);
                if (b.added) v += load_some(b.added + r * b.added_stride + at, left);
                store_some(b.y + r * b.y_stride + at, v, left);
            }
        }
    }
}

template <class F>
void pack_of(const float* rows, int outputs, int inputs, char* weight, float* scale, int32_t* offset) {
    constexpr int kSize = F::kVector / kLanes / F::kPer;  // bytes of a weight
    const int64_t tile = int64_t(words_of<F>(inputs)) * F::kVector;
    for (int64_t output = 0; output < outputs; ++output) {
        const float* row = rows + output * inputs;
        float most = 0;
        int32_t total = 0;
        if constexpr (kIsBytes<F>) {
            for (int c = 0; c < inputs; ++c) {
                const float size = __builtin_fabsf(row[c]);
                most = size > most ? size : most;
            }
        }
        for (int64_t c = 0; c < inputs; ++c) {
            char* to = weight + output / kLanes * tile + c / F::kPer * F::kVector +
                       output % kLanes * F::kPer * kSize + c % F::kPer * kSize;
            if constexpr (kIsBytes<F>) {
                const int32_t value = most > 0 ? (int32_t)__builtin_lrintf(row[c] * (127.0f / most)) : 0;
                *to = (char)value, total += value;
            } else if constexpr (kSize == 2) {
                const uint16_t bits = bf16_of(row[c]);
                __builtin_memcpy(to, &bits, sizeof bits);
            } else {
                __builtin_memcpy(to, row + c, sizeof *row);
            }
        }
        if constexpr (kIsBytes<F>) scale[output] = most / 127.0f, offset[output] = F::kZero * total;
    }
}

// Sizes of a head. Keys are weights whose outputs are positions, values such whose inputs are positions.
template <class F>
struct Head {
    int words, padded;
    int64_t query_stride, key_tile, value_tile;
    Head(int width, int positions)
        : words(words_of<F>(width)),
          padded(pad(positions, kBlock)),
          query_stride(operand_stride(words)),
          key_tile(int64_t(words) * F::kVector),
          value_tile(int64_t(padded / F::kPer) * F::kVector) {}
};

template <class F>
HeadBytes head_bytes_of(int width, int positions) {
    const Head<F> head(width, positions);
    return {head.padded * head.query_stride, head.padded / kLanes * head.key_tile,
            pad(width) / kLanes * head.value_tile};
}

// A block's rows of q, k, v -> queries, keys, values; zeros for the rows that a last block lacks. The scores'
// scale goes into the queries, times log2(e), as their softmax is one of powers of two.
template <class F>
void split_of(const HeadBlock& b) {
    const Head<F> head(b.width, b.positions);
    const float scale = 1.44269504f / __builtin_sqrtf((float)b.width);
    float* row = (float*)b.scratch;
    char* operands = b.scratch + pad(b.width) * 4;
    const auto copy_row = [&](const float* from, int r, float factor) {
        for (int c = 0; c < b.width; ++c) row[c] = r < b.rows ? from[r * b.stride + c] * factor : 0.0f;
    };
    for (int r = 0; r < kBlock; ++r) {
        copy_row(b.q, r, scale);
        make_operand<F>(row, b.width, b.queries + (b.first + r) * head.query_stride);
    }
    for (int r = 0; r < kBlock; r += kLanes) {
        char* tile = b.keys + (b.first + r) / kLanes * head.key_tile;
        for (int i = 0; i < kLanes; ++i) {
            copy_row(b.k, r + i, 1.0f);
            make_operand<F>(row, b.width, operands + i * head.query_stride);
        }
        for (int word = 0; word < head.words; ++word) {
            for (int i = 0; i < kLanes; ++i) {
                const char* from = operands + i * head.query_stride + word * 4;
                char* to = tile + word * F::kVector + i * (F::kVector / kLanes);
                if constexpr (F::kVector == 64) {
                    __builtin_memcpy(to, from, 4);
                } else {  // widened operands
                    const uint16_t bits = bf16_of(at<float>(from));
                    __builtin_memcpy(to, &bits, sizeof bits);
                }
            }
        }
    }
    for (int c = 0; c < pad(b.width); c += kLanes) {
        char* tile = b.values + c / kLanes * head.value_tile + b.first / F::kPer * F::kVector;
        const auto value = [&](int r) {
            return r < b.rows && c < b.width ? load_some(b.v + r * b.stride + c, b.width - c) : Vec{};
        };
        for (int r = 0; r < kBlock; r += F::kPer, tile += F::kVector) {
            if constexpr (F::kPer == 2) {
                store(tile, round_to_bf16(value(r)) | (round_to_bf16(value(r + 1)) << 16));
            } else if constexpr (F::kVector == 32) {
                int32_t each[kLanes];
                store(each, round_to_bf16(value(r)));
                for (int i = 0; i < kLanes; ++i) ((uint16_t*)tile)[i] = (uint16_t)each[i];
            } else {
                store(tile, value(r));
            }
        }
    }
}

// softmax(q k) v of a block's queries, block of keys by block of keys: what was summed before is brought to
// the new largest score.
template <class F>
void attend_of(const HeadBlock& b) {
    constexpr bool kCoarse = !std::is_same_v<F, InFp32>;
    const Head<F> head(b.width, b.positions);
    const int together = pad(b.rows, kTogether), width = pad(b.width);
    char* scores = b.scratch;
    char* weights = scores + kBlock * kKeys * 4;
    float* out = (float*)(weights + kBlock * operand_stride(kKeys));
    float largest[kBlock], sums[kBlock];
    for (int r = 0; r < kBlock; ++r) largest[r] = -__builtin_inff(), sums[r] = 0;
    const Tiles tiles;
    for (int first = 0; first < b.positions; first += kKeys) {
        const int keys = b.positions - first < kKeys ? b.positions - first : kKeys, padded = pad(keys);
        for (int key = 0; key < padded; key += kTwoTiles)
            products<F>(b.queries + b.first * head.query_stride, head.query_stride, together,
                        b.keys + (first + key) / kLanes * head.key_tile, head.key_tile, head.words,
                        scores + key * 4, kKeys * 4, false);
        for (int r = 0; r < together; ++r) {
            float* row = (float*)(scores + r * kKeys * 4);
            for (int key = keys; key < padded; ++key) row[key] = -__builtin_inff();
            Vec most = load<Vec>(row);
            for (int key = kLanes; key < padded; key += kLanes) most = maximum(most, load<Vec>(row + key));
            const float before = largest[r], now = maximum_of(most);
            largest[r] = now > before ? now : before;
            if (first && now > before) {
                const Vec factor = power_of_two<false>(fill(before - now));
                sums[r] *= largest_of(factor);
                for (int c = 0; c < width; c += kLanes)
                    store(out + r * width + c, load<Vec>(out + r * width + c) * factor);
            }
            Vec total = {};
            for (int key = 0; key < padded; key += 2 * kLanes) {
                Vec a = power_of_two<kCoarse>(load<Vec>(row + key) - largest[r]);
                Vec c = power_of_two<kCoarse>(load<Vec>(row + key + kLanes) - largest[r]);
                total += a + c;
                F::put(a, c, weights + r * operand_stride(kKeys) + key * 4 / F::kPer);
            }
            sums[r] += sum(total);
        }
        for (int c = 0; c < width; c += kTwoTiles)
            products<F>(weights, operand_stride(kKeys), together,
                        b.values + c / kLanes * head.value_tile + first / F::kPer * F::kVector,
                        head.value_tile, padded / F::kPer, (char*)(out + c), width * 4, first > 0);
    }
    for (int r = 0; r < b.rows; ++r) {
        const float inverse = 1.0f / sums[r];
        for (int c = 0; c < b.width; c += kLanes)
            store_some(b.out + r * b.out_stride + c, load<Vec>(out + r * width + c) * inverse, b.width - c);
    }
}

// Calls work with the kernels' type for a format: of matrices, and of attention.
template <class Work>
INLINE auto with_format(Dtype format, const Work& work) {
    return format == Dtype::int8 ? work(InInt8()) : format == Dtype::bf16 ? work(InBf16()) : work(InFp32());
}
template <class Work>
INLINE auto with_head_format(Dtype format, const Work& work) {
    return format == Dtype::fp32 ? work(InFp32()) : work(InBf16());
}

int words(Dtype format, int inputs) {
    return with_format(format, [&](auto f) { return words_of<decltype(f)>(inputs); });
}
int64_t weight_bytes(Dtype format, int outputs, int inputs) {
    return with_format(format, [&](auto f) {
        typedef decltype(f) F;
        return int64_t(pad(outputs) / kLanes) * words_of<F>(inputs) * F::kVector;
    });
}
void pack(Dtype format, const float* rows, int outputs, int inputs, void* weight, float* scale,
          int32_t* offset) {
    with_format(format,
                [&](auto f) { pack_of<decltype(f)>(rows, outputs, inputs, (char*)weight, scale, offset); });
}
void linear_block(const LinearBlock& b) {
    with_format(b.matrix->format, [&](auto f) { linear_of<decltype(f)>(b); });
}
HeadBytes head_bytes(Dtype format, int width, int positions) {
    return with_head_format(format, [&](auto f) { return head_bytes_of<decltype(f)>(width, positions); });
}
void split(const HeadBlock& b) {
    with_head_format(b.format, [&](auto f) { split_of<decltype(f)>(b); });
}
void attend_block(const HeadBlock& b) {
    with_head_format(b.format, [&](auto f) { attend_of<decltype(f)>(b); });
}

#undef UNROLL

}  // namespace

extern const EncoderKernels KVSPN_ENCODER;
const EncoderKernels KVSPN_ENCODER = {KVSPN_ENCODER_NAME, words,      weight_bytes, pack,
                                      linear_block,       head_bytes, split,        attend_block};

}  // namespace kvspn
