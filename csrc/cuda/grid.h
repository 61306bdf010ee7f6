// The threads of a grid in warps, and what every stage and op does with them: sums, formats, fresh reads.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/accept.h"
#include "cuda/device.h"
#include "cuda/plan.h"

namespace kvspn::cuda {

__device__ __forceinline__ int lane() { return thread_index() & 31; }
__device__ __forceinline__ int warp() { return thread_index() >> 5; }
__device__ __forceinline__ int warps() { return thread_count() >> 5; }
// Neighbouring outputs are on different multiprocessors.
__device__ __forceinline__ int grid_warp() { return warp() * block_count() + block_index(); }
__device__ __forceinline__ int grid_warps() { return warps() * block_count(); }

// What other blocks may have written: past the L1 cache.
#if defined(__CUDACC__)
template <class T>
__device__ __forceinline__ T fresh(const T* from) {
    return __ldcg(from);
}
#else
template <class T>
T fresh(const T* from) {
    return *from;
}
#endif

// Calls body(a value of the type).
template <class Body>
__device__ __forceinline__ void with_float(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::fp16:
            return body(Half{});
        case Dtype::bf16:
            return body(Bfloat{});
        default:
            return body(float{});
    }
}
template <class Body>
__device__ __forceinline__ void with_kv(Dtype dtype, Body body) {
    dtype == Dtype::int8 ? body(int8_t{}) : with_float(dtype, body);
}
template <class Body>
__device__ __forceinline__ void with_weight(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::int4:
            return body(Nibbles{});
        case Dtype::fp8:
            return body(Fp8{});
        default:
            return with_kv(dtype, body);
    }
}

__device__ __forceinline__ float sum_of_warp(float value, int lanes = 1) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        if (mask >= lanes) value += from_lane_xor(value, mask);
    return value;
}
__device__ __forceinline__ float max_of_warp(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value = fmaxf(value, from_lane_xor(value, mask));
    return value;
}

__device__ __forceinline__ float element(const Table& table, int64_t index) {
    switch (table.dtype) {
        case Dtype::fp16:
            return to_float(static_cast<const Half*>(table.rows)[index]);
        case Dtype::bf16:
            return to_float(static_cast<const Bfloat*>(table.rows)[index]);
        default:
            return static_cast<const float*>(table.rows)[index];
    }
}

// 16 bytes from `at` on of a row that is not aligned to them, with zeros from its end on.
template <class T>
__device__ __forceinline__ uint4 load_elements(const char* row, int at, int bytes) {
    using Bits =
        std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; i += sizeof(T))
        if (at + i < bytes)
            words[i / 4] |= uint32_t(*reinterpret_cast<const Bits*>(row + at + i)) << 8 * (i % 4);
    return {words[0], words[1], words[2], words[3]};
}

// A position's columns, 16 a lane of the `lanes` that share it -> int8 and their scale, to the bit as
// quantise() of kvspn/ops/append_kv.py.
__device__ __forceinline__ uint4 quantise(const float (&x)[16], int lanes, float& scale) {
    uint32_t bits = 0;  // of the largest: infinity and NaN are larger than numbers
#pragma unroll
    for (int i = 0; i < 16; ++i) bits = max(bits, as_bits(x[i]) & 0x7fffffff);
    for (int mask = lanes / 2; mask > 0; mask /= 2)
        bits = max(bits, as_bits(from_lane_xor(as_float(bits), mask)));
    const float largest = as_float(bits), factor = 127.f / largest;
    scale = largest / 127.f;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float value = x[i] * factor;
        const int rounded = fabsf(value) < 128.f ? int(rintf(value)) : 0;  // 0 for what is not finite
        words[i / 4] |= uint32_t(rounded & 255) << 8 * (i % 4);
    }
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace kvspn::cuda
