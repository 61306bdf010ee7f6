// Element types, and a matrix packed for the kernels of the CPU: what every device reads of the weights.
#pragma once

#include <cstdint>

namespace kvspn {

enum class Dtype : int32_t { fp32, bf16, fp16, int8, int32, boolean, int4 };

constexpr int kLanes = 16;  // floats of a vector, on every instruction set
constexpr int kDepth = 8;   // columns of a block of int4
constexpr int pad(int n, int to = 2 * kLanes) { return (n + to - 1) / to * to; }
inline bool is_integer(Dtype dtype) { return dtype == Dtype::int8 || dtype == Dtype::int4; }

// y = x W^T + bias. W is cut into tiles of kLanes outputs, the last one filled up with zeros; a tile is one
// stream of memory that holds, in order of the columns,
//   fp32, fp16: a column's kLanes outputs;
//   bf16, int8: of each pair of columns, each output's two weights (a last odd column of bf16 as above);
//   int4: of each block of kDepth columns, 16 bits for each output and each parity: its four even, then its
//   four odd columns, the first in the lowest bits.
// Integer weights are multiplied with int16 activations in int32, and the sums of a span with its scale.
struct Matrix {
    Dtype dtype = Dtype::fp32;
    const void* weight = nullptr;
    const float* scale = nullptr;  // [tiles, spans, kLanes]
    const float* bias = nullptr;   // [tiles, kLanes] or null
    int outputs = 0;
    int inputs = 0;
    int columns = 0;  // the inputs; of an integer matrix: padded to a multiple of kDepth
    int span = 0;     // columns whose products with int16 fit into an int32 and that share a scale

    // Of weights, scales and bias, as a reading of all outputs takes them.
    int64_t bytes() const {
        const int bits = dtype == Dtype::fp32 ? 32 : dtype == Dtype::int8 ? 8 : dtype == Dtype::int4 ? 4 : 16;
        const int64_t spans = !scale ? 0 : span ? (columns + span - 1) / span : 1;
        return outputs * (int64_t(columns) * bits / 8 + (spans + (bias ? 1 : 0)) * int64_t(sizeof(float)));
    }
};

}  // namespace kvspn
