// What device code needs of the hardware, each a few instructions with a twin on the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <algorithm>
#include <cstring>

#include "common/fp16.h"
#include "cuda/emulation.h"
#endif

#include "cuda/plan.h"

namespace kvspn::cuda {

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
struct Fp8 {  // e4m3
    uint8_t bits;
};
struct Nibbles {  // of int4: two to a byte, the first in its low half, each the value plus 8
    uint8_t bits;
};

// Elements of a 16-byte load.
template <class T>
constexpr int kPerLoad = 16 / sizeof(T);
template <>
constexpr int kPerLoad<Nibbles> = 32;

#if defined(__CUDACC__)

__device__ __forceinline__ int thread_index() { return int(threadIdx.x); }
__device__ __forceinline__ int thread_count() { return kThreads; }
__device__ __forceinline__ int block_index() { return int(blockIdx.x); }
__device__ __forceinline__ int block_count() { return int(gridDim.x); }
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<char*>(memory);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float from_lane_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}
template <class T>  // int or float
__device__ __forceinline__ T from_lane(T value, int lane) {
    return __shfl_sync(0xffffffff, value, lane);
}

// Weights: nobody writes them while a kernel runs, and each is read once.
__device__ __forceinline__ uint4 load_weights(const void* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}
// Keys and values: an earlier stage of the same kernel may have written them.
__device__ __forceinline__ uint4 load_kv(const void* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// What is computed from it is computed again wherever it is needed, not kept in registers.
__device__ __forceinline__ void forget_origin(uint4& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}
__device__ __forceinline__ float to_float(Half h) { return __half2float(__ushort_as_half(h.bits)); }
__device__ __forceinline__ void store(Half* to, float value) {
    to->bits = __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ void store(Bfloat* to, float value) {
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ void atomic_max(uint64_t* at, uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ int atomic_add(int* at, int value) { return atomicAdd(at, value); }
__device__ __forceinline__ void fence_host() { __threadfence_system(); }

// What the present thread and, by a sync_block() before it, its block wrote is seen by whoever acquires.
__device__ __forceinline__ uint32_t add_release(uint32_t* at, uint32_t value) {
    uint32_t old;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(at), "r"(value)
                 : "memory");
    return old;
}
// The same, and it sees what those wrote that came before it.
__device__ __forceinline__ int add_acquire_release(int* at, int value) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(at), "r"(value)
                 : "memory");
    return old;
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* at) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
__device__ __forceinline__ void wait_a_moment() {}

// Cycles of the multiprocessor, and nanoseconds of the device.
__device__ __forceinline__ int64_t cycles() { return clock64(); }
__device__ __forceinline__ int64_t nanoseconds() {
    int64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

// Bytes that a warp will want soon go to the L2 cache; `from` and `bytes` are multiples of 16.
__device__ __forceinline__ void prefetch(const char* from, int64_t bytes, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && bytes > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(int(bytes)) : "memory");
#else
    for (int64_t at = int64_t(lane) * 128; at < bytes; at += 32 * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
#endif
}

// Between kernels of one stream: the next may start while this one runs, and waits for its results itself.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

using std::max, std::min;

inline int thread_index() { return emulation::place().thread; }
inline int thread_count() { return emulation::place().threads; }
inline int block_index() { return emulation::place().block; }
inline int block_count() { return emulation::place().blocks; }
inline char* shared_memory() { return static_cast<char*>(emulation::place().shared); }

inline void sync_block() { emulation::sync_block(); }
inline void sync_warp() { emulation::sync_warp(); }

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float from_lane_xor(float value, int mask) {
    return as_float(uint32_t(emulation::exchange(as_bits(value), emulation::place().thread ^ mask)));
}
inline int from_lane(int value, int lane) { return int(emulation::exchange(uint32_t(value), lane)); }
inline float from_lane(float value, int lane) {
    return as_float(uint32_t(emulation::exchange(as_bits(value), lane)));
}

inline uint4 load_weights(const void* from) { return *static_cast<const uint4*>(from); }
inline uint4 load_kv(const void* from) { return *static_cast<const uint4*>(from); }

inline void forget_origin(uint4&) {}

inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
inline float to_float(Half h) { return fp16_to_float(h.bits); }
inline void store(Half* to, float value) { to->bits = float_to_fp16(value); }
inline void store(Bfloat* to, float value) {
    const uint32_t bits = as_bits(value);
    to->bits = value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void atomic_max(uint64_t* at, uint64_t value) { *at = std::max(*at, value); }
inline int atomic_add(int* at, int value) { return (*at += value) - value; }
inline void fence_host() {}
inline uint32_t add_release(uint32_t* at, uint32_t value) { return (*at += value) - value; }
inline int add_acquire_release(int* at, int value) { return (*at += value) - value; }
inline uint32_t load_acquire(const uint32_t* at) { return *at; }
inline void wait_a_moment() { emulation::yield(); }

inline int64_t cycles() { return emulation::ticks(); }
inline int64_t nanoseconds() { return emulation::ticks(); }

// Reads the ends, so that a sanitizer sees a range that is not there.
inline void prefetch(const char* from, int64_t bytes, int lane) {
    if (lane || bytes <= 0) return;
    [[maybe_unused]] volatile char first = from[0], last = from[bytes - 1];
}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

#endif

__device__ __forceinline__ float to_float(Bfloat b) { return as_float(uint32_t(b.bits) << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void store(float* to, float value) { *to = value; }

// The elements of a load, as floats.
__device__ __forceinline__ void unpack(const uint4& v, float (&out)[4], float) {
    out[0] = as_float(v.x), out[1] = as_float(v.y), out[2] = as_float(v.z), out[3] = as_float(v.w);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&out)[8], Bfloat) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[2 * i] = as_float(words[i] << 16), out[2 * i + 1] = as_float(words[i] & 0xffff0000);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&out)[8], Half) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[2 * i] = to_float(Half{uint16_t(words[i])}),
                out[2 * i + 1] = to_float(Half{uint16_t(words[i] >> 16)});
}
__device__ __forceinline__ void unpack(const uint4& v, float (&out)[16], int8_t) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        // The byte plus 128 as the last bits of 2^23: exact, and cheaper than a conversion.
        const uint32_t biased = words[i / 4] ^ 0x80808080;
        out[i] = as_float(select_bytes(biased, 0x4b000000, 0x7440 + i % 4)) - 8388736.f;
    }
}

__device__ __forceinline__ void unpack(const uint4& v, float (&out)[16], Fp8) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Sign, exponent and mantissa where a float has them, whose exponent is then 120 too small.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int32_t first = int32_t(words[i] << 8 * (3 - j));
            out[4 * i + j] = as_float(uint32_t(first >> 4) & 0x87f00000) * 0x1p120f;
        }
        const uint32_t nan = ((words[i] & 0x7f7f7f7f) + 0x01010101) & 0x80808080;  // bytes that are NaN
        if (nan) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (nan >> 8 * j & 0x80) out[4 * i + j] = as_float(0x7fffffff);
        }
    }
}

__device__ __forceinline__ void unpack(const uint4& v, float (&out)[32], Nibbles) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 32; ++i)
        out[i] = as_float((words[i / 8] >> 4 * (i % 8) & 15) | 0x4b000000) - 8388616.f;
}

}  // namespace kvspn::cuda
