// The CPU kernels behind one table, a table for each instruction set.
//
// All work on fp32 activations. A row's result does not depend on the other rows or on the range of outputs:
// every output is one fixed chain of operations on one thread.
#pragma once

#include <cstdint>

namespace kvspn {

enum class Dtype : int32_t { fp32, bf16, fp16, int8, int32, boolean };

constexpr int kLanes = 16;   // floats of a vector, on every instruction set
constexpr int kBlock = 32;   // columns of a matrix are padded to a multiple
constexpr int kQueries = 4;  // that share one reading of keys and values
constexpr int pad(int n) { return (n + kBlock - 1) / kBlock * kBlock; }

// y = x W^T * scale + bias. Rows of W are padded with zeros to `columns`, a multiple of kBlock. In bf16 the
// halves of a block are interleaved: column c and column c + 16 share 32 bits.
struct Matrix {
    Dtype dtype = Dtype::fp32;
    const void* weight = nullptr;
    const float* scale = nullptr;  // [outputs], int8 alone
    const float* bias = nullptr;   // [outputs] or null
    int outputs = 0;
    int columns = 0;
};

// Attention of up to kQueries queries to the keys of `layers` layers under one softmax.
struct Attention {
    Dtype dtype = Dtype::fp32;
    const void* keys = nullptr;    // of the first layer: [positions, width]
    const void* values = nullptr;  // the same
    int64_t layer_stride = 0;      // elements from a layer's keys to the next layer's
    int layers = 1;
    int width = 0;
    int queries = 0;
    int lengths[kQueries] = {};  // positions that each query sees
    const float* q[kQueries] = {};
    float* out[kQueries] = {};
    float* scores = nullptr;  // scratch [kQueries, layers * pad(longest)]
};

struct Kernels {
    const char* name;
    // Outputs first .. last of every row: y[row * y_stride + output] = or += (accumulate).
    void (*linear)(const Matrix& matrix, const float* x, int64_t x_stride, int rows, int first, int last,
                   float* y, int64_t y_stride, bool accumulate);
    void (*attend)(const Attention& attention);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int width, float* y);
    void (*gelu)(float* x, int count);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

// The best that the machine has, or the one that the environment variable KVSPN_CPU names.
const Kernels& select_kernels();

}  // namespace kvspn
