// Half precision in its bits, since some compilers have no type for it (GCC 11, Clang 14, GCC 12 on AArch64).
//
// Static: in the kernels each file is compiled for an instruction set of its own.
#pragma once

#include <cstdint>

namespace kvspn {

static inline float fp16_to_float(uint16_t bits) {
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
    constexpr uint32_t kBias = (127 - 15) << 23, kInfinity = 0x1f << 23, kOne = 1 << 23;
    uint32_t wide = magnitude + kBias;
    if (magnitude >= kInfinity) wide += kBias;  // infinities and NaN: the exponent 31 becomes 255
    float value;
    if (magnitude < kOne) {  // subnormal: no hidden one
        constexpr uint32_t smallest_bits = kBias + kOne;
        float smallest;
        wide += kOne;
        __builtin_memcpy(&value, &wide, sizeof value);
        __builtin_memcpy(&smallest, &smallest_bits, sizeof smallest);
        value -= smallest;
        __builtin_memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

// To nearest, ties to even.
static inline uint16_t float_to_fp16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff));  // NaN stays NaN
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);                        // 65520 and more
    if (bits < 0x38800000) {  // under 2^-14: the addition of 0.5 rounds to multiples of 2^-24
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, sizeof bits);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

}  // namespace kvspn
