// Vectors of 16 floats on every instruction set, so that a sum has one order on all of them: a register of
// AVX-512, or pairs of shorter ones. Each including file compiles this with its own flags. No standard
// container or inline function may be used: the linker would take one copy of it for all instruction sets.
#pragma once

#include <type_traits>

#include "common/fp16.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

namespace kvspn {
namespace {

#define INLINE inline __attribute__((always_inline))

// Two vectors as one of twice the length. (GCC keeps vectors longer than a register in memory.)
template <class V>
struct Pair {
    V low, high;
};
template <class V>
Pair(V, V) -> Pair<V>;

#if defined(__AVX512F__)
constexpr int kBytes = 64;  // of a register
template <class V>
using Whole = V;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
template <class V>
using Whole = Pair<V>;
#else
constexpr int kBytes = 16;
template <class V>
using Whole = Pair<Pair<V>>;
#endif

// What one register holds.
typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Integers __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));

typedef Whole<Floats> Vec;
typedef Whole<Integers> IVec;
typedef Whole<Shorts> Words;
static_assert(sizeof(Vec) == kLanes * sizeof(float));

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

struct Byte {  // a float of an int8 cache
    int8_t value;
};

struct Fp8 {  // e4m3; widened it is kUnit<Fp8> times too small, which its scale makes up for
    int8_t bits;
};

template <class T>
constexpr float kUnit = 1.0f;
template <>
constexpr float kUnit<Fp8> = 256.0f;  // between the exponents of fp8 and of fp16

template <class V>
constexpr bool kIsPair = false;
template <class V>
constexpr bool kIsPair<Pair<V>> = true;

template <class V>
struct ElementOf {
    typedef std::remove_reference_t<decltype(V{}[0])> type;
};
template <class V>
struct ElementOf<Pair<V>> : ElementOf<V> {};
template <class V>
using Element = typename ElementOf<V>::type;

#define KVSPN_OPERATOR(op)                             \
    template <class V>                                 \
    INLINE auto operator op(Pair<V> a, Pair<V> b) {    \
        return Pair{a.low op b.low, a.high op b.high}; \
    }                                                  \
    template <class V>                                 \
    INLINE auto operator op(Pair<V> a, Element<V> b) { \
        return Pair{a.low op b, a.high op b};          \
    }                                                  \
    template <class V>                                 \
    INLINE auto operator op(Element<V> a, Pair<V> b) { \
        return Pair{a op b.low, a op b.high};          \
    }
KVSPN_OPERATOR(+)
KVSPN_OPERATOR(-)
KVSPN_OPERATOR(*)
KVSPN_OPERATOR(/)
KVSPN_OPERATOR(&)
KVSPN_OPERATOR(|)
KVSPN_OPERATOR(<)
KVSPN_OPERATOR(>)
KVSPN_OPERATOR(==)
#undef KVSPN_OPERATOR

template <class V>
INLINE Pair<V> operator-(Pair<V> a) {
    return {-a.low, -a.high};
}
template <class V>
INLINE Pair<V> operator~(Pair<V> a) {
    return {~a.low, ~a.high};
}
template <class V>
INLINE Pair<V> operator<<(Pair<V> a, int bits) {
    return {a.low << bits, a.high << bits};
}
template <class V>
INLINE Pair<V> operator>>(Pair<V> a, int bits) {
    return {a.low >> bits, a.high >> bits};
}
template <class V, class B>
INLINE void operator+=(Pair<V>& a, B b) {
    a = a + b;
}
template <class V, class B>
INLINE void operator*=(Pair<V>& a, B b) {
    a = a * b;
}

template <class V>
INLINE V load(const void* p) {
    if constexpr (kIsPair<V>) {
        typedef decltype(V::low) Half;
        return {load<Half>(p), load<Half>((const char*)p + sizeof(Half))};
    } else {
        V v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
}

template <class V>
INLINE void store(void* p, V v) {
    if constexpr (kIsPair<V>) {
        store(p, v.low), store((char*)p + sizeof v.low, v.high);
    } else {
        __builtin_memcpy(p, &v, sizeof v);
    }
}

// The same bits.
template <class To, class V>
INLINE To as(V v) {
    if constexpr (kIsPair<V>) {
        return {as<decltype(To::low)>(v.low), as<decltype(To::low)>(v.high)};
    } else {
        return (To)v;
    }
}

// The same values, floats cut off.
template <class To, class V>
INLINE To convert(V v) {
    if constexpr (kIsPair<V>) {
        return {convert<decltype(To::low)>(v.low), convert<decltype(To::low)>(v.high)};
    } else {
        return __builtin_convertvector(v, To);
    }
}

INLINE Vec fill(float x) { return Vec{} + x; }

template <class V>
INLINE V select(IVec where, V a, V b) {
    return as<V>((where & as<IVec>(a)) | (~where & as<IVec>(b)));
}
INLINE Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// 0, 1, ..., 15.
INLINE IVec lanes() {
    constexpr int32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<IVec>(numbers);
}

// The elements of `a`, and behind them those of `b`, at these places.
template <int... Places, class V>
INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Places...);
#else
    typedef decltype(a < b) Mask;
    return __builtin_shuffle(a, b, Mask{Places...});
#endif
}

// fp8, its sign extended to int16 -> fp16 with the same fields, NaN as NaN.
template <class V>
INLINE V fp8_to_fp16(V bits) {
    const V half = bits << 7 & (int16_t)0xbfff;
    return half | (V)((half & 0x3fff) == 0x3f80);
}

// Of one register: fma is a * b + c, rounded once where the instruction set can, and written out, since a
// compiler that fuses as it likes does not do so alike for every number of rows; dot adds the products of
// neighbours; sum and sums (of as many registers as one has floats, one sum for each) add halves to halves,
// and pairs to pairs; widen_register reads as many elements as there are in a register of the wider type.
#if defined(__AVX512F__)
INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE Integers dot(Shorts a, Shorts b, Integers acc) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    return acc + (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
INLINE float sum(Floats v) {
    v += shuffle<8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7>(v, v);
    v += shuffle<4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11>(v, v);
    return (v[0] + v[2]) + (v[1] + v[3]);
}
INLINE Floats sums(const Floats* v) {
    Floats a[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = shuffle<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(v[2 * i], v[2 * i + 1]) +
               shuffle<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a[2 * i], a[2 * i + 1]) +
               shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        a[i] = shuffle<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(a[2 * i], a[2 * i + 1]) +
               shuffle<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(a[2 * i], a[2 * i + 1]);
    }
    return shuffle<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a[0], a[1]) +
           shuffle<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a[0], a[1]);
}
INLINE Floats widen_register(const Bf16* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
}
INLINE Floats widen_register(const Fp16* p) { return (Floats)_mm512_cvtph_ps(load<__m256i>(p)); }
INLINE void narrow_register(Floats v, Fp16* p) { store(p, _mm512_cvtps_ph((__m512)v, 0)); }
INLINE Floats widen_register(const Byte* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
}
INLINE Floats widen_register(const Fp8* p) {
    typedef int16_t Half __attribute__((vector_size(kBytes / 2)));
    return (Floats)_mm512_cvtph_ps((__m256i)fp8_to_fp16((Half)_mm256_cvtepi8_epi16(load<__m128i>(p))));
}
INLINE Shorts widen_register(const int8_t* p) { return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(p)); }
#elif defined(__AVX2__)
INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE Integers dot(Shorts a, Shorts b, Integers acc) {
    return acc + (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
INLINE float sum(Floats v) {
    const auto four = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE Floats sums(const Floats* v) {
    __m256 fours[2];
    for (int i = 0; i < 2; ++i) {
        const __m256* w = (const __m256*)v + 4 * i;
        fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    }
    return (Floats)(_mm256_permute2f128_ps(fours[0], fours[1], 0x20) +
                    _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
INLINE Floats widen_register(const Bf16* p) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
}
INLINE Floats widen_register(const Fp16* p) { return (Floats)_mm256_cvtph_ps(load<__m128i>(p)); }
INLINE void narrow_register(Floats v, Fp16* p) { store(p, _mm256_cvtps_ph((__m256)v, 0)); }
INLINE Floats widen_register(const Byte* p) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE Floats widen_register(const Fp8* p) {
    typedef int16_t Half __attribute__((vector_size(kBytes / 2)));
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return (Floats)_mm256_cvtph_ps((__m128i)fp8_to_fp16((Half)_mm_cvtepi8_epi16(bytes)));
}
INLINE Shorts widen_register(const int8_t* p) { return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(p)); }
#else
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "widen_register moves bytes");
typedef int64_t Longs __attribute__((vector_size(kBytes)));
typedef int8_t Bytes __attribute__((vector_size(kBytes)));

// As fp16_to_float does it, four at a time and without a branch: magnitudes in the place of a float's, signs
// in the first bit; what is as large as `special` becomes infinite or NaN.
INLINE Floats fp16_to_floats(Integers magnitude, Integers signs, int32_t special) {
    constexpr int32_t kBias = (127 - 15) << 23, kOne = 1 << 23, kInfinity = 0xff << 23;
    const int32_t rest = kInfinity - kBias - (special & kInfinity);
    const Integers normal = magnitude + kBias + ((magnitude >= special) & rest);
    const Integers smallest = Integers{} + (kBias + kOne);
    const Integers subnormal = (Integers)((Floats)(magnitude + smallest) - (Floats)smallest);
    return (Floats)((magnitude < kOne ? subnormal : normal) | (signs & (Integers{} + INT32_MIN)));
}

#if defined(__aarch64__)
INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE Integers dot(Shorts a, Shorts b, Integers acc) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return acc + (Integers)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
INLINE Floats widen_register(const Fp16* p) {
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
INLINE void narrow_register(Floats v, Fp16* p) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
#else
INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Integers dot(Shorts a, Shorts b, Integers acc) {
#if defined(__SSE2__)
    return acc + (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Integers x = (Integers)a, y = (Integers)b;
    return acc + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}
INLINE Floats widen_register(const Fp16* p) {
    const Shorts four = (Shorts)Longs{load<int64_t>(p)};
    const Integers bits = (Integers)shuffle<0, 8, 1, 9, 2, 10, 3, 11>(four, Shorts{});
    return fp16_to_floats((bits & 0x7fff) << 13, bits << 16, 0x1f << 23);
}
INLINE void narrow_register(Floats v, Fp16* p) {
    for (int i = 0; i < 4; ++i) p[i].bits = float_to_fp16(v[i]);
}
#endif
INLINE float sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE Floats sums(const Floats* v) {
    Floats a[2];
    for (int i = 0; i < 2; ++i) {
        a[i] = shuffle<0, 4, 2, 6>(v[2 * i], v[2 * i + 1]) + shuffle<1, 5, 3, 7>(v[2 * i], v[2 * i + 1]);
    }
    return shuffle<0, 1, 4, 5>(a[0], a[1]) + shuffle<2, 3, 6, 7>(a[0], a[1]);
}
INLINE Floats widen_register(const Bf16* p) {
    const Shorts four = (Shorts)Longs{load<int64_t>(p)};
    return (Floats)shuffle<0, 8, 1, 9, 2, 10, 3, 11>(Shorts{}, four);
}
INLINE Integers four_bytes(const void* p) {
    const Bytes four = (Bytes)Integers{load<int32_t>(p)};
    const Bytes twice = shuffle<0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7>(four, four);
    return (Integers)shuffle<0, 0, 1, 1, 2, 2, 3, 3>((Shorts)twice, (Shorts)twice) >> 24;
}
INLINE Floats widen_register(const Byte* p) { return convert<Floats>(four_bytes(p)); }
INLINE Floats widen_register(const Fp8* p) {
    const Integers bits = four_bytes(p);
    return fp16_to_floats((bits & 0x7f) << 20, bits, 0x7f << 20);
}
INLINE Shorts widen_register(const int8_t* p) {
    const Bytes eight = (Bytes)Longs{load<int64_t>(p)};
    return (Shorts)shuffle<0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7>(eight, eight) >> 8;
}
#endif
INLINE Floats widen_register(const float* p) { return load<Floats>(p); }

template <class V>
INLINE Pair<V> fma(Pair<V> a, Pair<V> b, Pair<V> c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

template <class S, class I>
INLINE Pair<I> dot(Pair<S> a, Pair<S> b, Pair<I> acc) {
    return {dot(a.low, b.low, acc.low), dot(a.high, b.high, acc.high)};
}

template <class V>
INLINE float sum(Pair<V> v) {
    return sum(v.low + v.high);
}

// Element i of the result is the sum of v[i].
template <class V>
INLINE Pair<V> sums(const Pair<V>* v) {
    constexpr int count = sizeof(V) / sizeof(float);
    V low[2 * count], high[2 * count];
    for (int i = 0; i < 2 * count; ++i) low[i] = v[i].low, high[i] = v[i].high;
    return {sums(low) + sums(high), sums(low + count) + sums(high + count)};
}

// As many elements as a vector has, in its wider type.
template <class V = Vec, class T>
INLINE V widen(const T* p) {
    if constexpr (kIsPair<V>) {
        typedef decltype(V::low) Half;
        return {widen<Half>(p), widen<Half>(p + sizeof(Half) / sizeof(Element<Half>))};
    } else {
        return widen_register(p);
    }
}

INLINE void narrow(Floats v, Fp16* p) { narrow_register(v, p); }
template <class V>
INLINE void narrow(Pair<V> v, Fp16* p) {
    narrow(v.low, p), narrow(v.high, p + sizeof(V) / sizeof(float));
}

// 32 elements: the first and the last 16; of bf16, which is cheaper so, the even and the odd ones.
template <class T>
INLINE void widen_two(const T* p, Vec& first, Vec& second) {
    first = widen(p), second = widen(p + kLanes);
}
INLINE void widen_two(const Bf16* p, Vec& first, Vec& second) {
    const IVec both = load<IVec>(p);
    first = as<Vec>(both << 16), second = as<Vec>(both & (int32_t)0xffff0000);
}

// 32 floats from and to the order in which `widen_two` has elements of T.
template <class T>
INLINE void load_two(const float* p, Vec& first, Vec& second) {
    first = load<Vec>(p), second = load<Vec>(p + kLanes);
    if constexpr (std::is_same_v<T, Bf16>) {
        float ordered[2 * kLanes];
        for (int i = 0; i < 2 * kLanes; ++i) ordered[i % 2 * kLanes + i / 2] = p[i];
        first = load<Vec>(ordered), second = load<Vec>(ordered + kLanes);
    }
}
template <class T>
INLINE void store_two(float* p, Vec first, Vec second) {
    store(p, first), store(p + kLanes, second);
    if constexpr (std::is_same_v<T, Bf16>) {
        float ordered[2 * kLanes];
        store(ordered, first), store(ordered + kLanes, second);
        for (int i = 0; i < 2 * kLanes; ++i) p[i] = ordered[i % 2 * kLanes + i / 2];
    }
}

// `count` < 16 elements, zeros behind them.
template <class T>
INLINE Vec load_part(const T* p, int count) {
    T part[kLanes] = {};
    __builtin_memcpy(part, p, count * sizeof(T));
    return widen(part);
}

template <class T>
INLINE Vec load_some(const T* p, int count) {
    return count >= kLanes ? widen(p) : load_part(p, count);
}

// The first `count` elements, or all 16.
INLINE void store_some(float* p, Vec v, int count) {
    if (count >= kLanes) return store(p, v);
    float part[kLanes];
    store(part, v);
    __builtin_memcpy(p, part, count * sizeof(float));
}

INLINE float largest_of(Vec v) {
    float each[kLanes];
    store(each, v);
    float most = each[0];
    for (int i = 1; i < kLanes; ++i) most = each[i] > most ? each[i] : most;
    return most;
}

// e^x; 0 under -87. After Cephes' expf; relative error under 2e-7.
INLINE Vec exponential(Vec x) {
    Vec bounded = larger(x, fill(-87.0f));
    Vec n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
    Vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    IVec power = (convert<IVec>(n) + 127) << 23;
    return select(x < -87.0f, fill(0.0f), p * as<Vec>(power));
}

// log(x) of a normal number. After Cephes' logf; relative error under 2e-7.
INLINE Vec logarithm(Vec x) {
    IVec bits = as<IVec>(x), power = (bits >> 23) - 126;
    Vec m = as<Vec>((bits & 0x007fffff) | 0x3f000000);  // 0.5 to 1
    IVec small = m < 0.707106781f;
    Vec e = convert<Vec>(power + small);  // `small` is -1 where it holds.
    m = select(small, m + m, m) - 1.0f;
    Vec p = fill(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Vec square = m * m;
    return m + (p * m * square - 2.12194440e-4f * e - 0.5f * square) + 0.693359375f * e;
}

}  // namespace
}  // namespace kvspn
