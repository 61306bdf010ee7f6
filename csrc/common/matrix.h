// Element types, and a matrix packed for the kernels of the CPU: what every device reads of the weights.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace kvspn {

enum class Dtype : int32_t { fp32, bf16, fp16, int8, int32, boolean, int4, fp8 };

// What a scale of a matrix is for: an output, or a group of an output's columns.
enum class Scales : uint8_t { none, outputs, groups };

// All that is said of an element type outside of the kernels that widen it.
struct Format {
    const char* name;
    int bits;
    Scales scales = Scales::none;
    bool integer = false;  // meets int16 activations in an engine on the CPU
    bool paired = false;   // and lies there in pairs of columns
};

constexpr Format kFormats[] = {
    // in the order of Dtype
    {"fp32", 32},
    {"bf16", 16, Scales::none, false, true},
    {"fp16", 16},
    {"int8", 8, Scales::outputs, true, true},
    {"int32", 32},
    {"bool", 8},
    {"int4", 4, Scales::groups, true},
    {"fp8", 8, Scales::outputs},
};
constexpr const Format& format_of(Dtype dtype) { return kFormats[int(dtype)]; }

constexpr std::initializer_list<Dtype> kFloats = {Dtype::fp32, Dtype::bf16, Dtype::fp16};
constexpr std::initializer_list<Dtype> kWeights = {Dtype::fp32, Dtype::bf16, Dtype::fp16,
                                                   Dtype::int8, Dtype::int4, Dtype::fp8};
constexpr const char* kScaledWeights = "an int8, int4 or fp8 weight";

constexpr int kLanes = 16;  // floats of a vector, on every instruction set
constexpr int kDepth = 8;   // columns of a block of int4
constexpr int pad(int n, int to = 2 * kLanes) { return (n + to - 1) / to * to; }
constexpr bool is_integer(Dtype dtype) { return format_of(dtype).integer; }

// y = x W^T + bias. W is cut into tiles of kLanes outputs, the last one filled up with zeros; a tile is one
// stream of memory that holds, in order of the columns,
//   fp32, fp16, fp8: a column's kLanes outputs;
//   bf16, int8: of each pair of columns, each output's two weights (a last odd column of bf16 as above);
//   int4: of each block of kDepth columns, 16 bits for each output and each parity: its four even, then its
//   four odd columns, the first in the lowest bits.
// Integer weights are multiplied with int16 activations in int32, and the sums of a span with its scale; of
// fp8 all columns are a span.
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
        const int bits = format_of(dtype).bits;
        const int64_t spans = !scale ? 0 : span ? (columns + span - 1) / span : 1;
        return outputs * (int64_t(columns) * bits / 8 + (spans + (bias ? 1 : 0)) * int64_t(sizeof(float)));
    }
};

// A matrix for blocks of rows, as the CPU's encoder kernels pack it (cpu/encoder_kernels.h). `format`: fp32,
// bf16, or int8, whose weights have a scale for each output and meet activations in int8.
struct BlockMatrix {
    Dtype format = Dtype::fp32;
    int outputs = 0, inputs = 0;
    const void* weight = nullptr;
    const float* scale = nullptr;     // of int8: [outputs, padded]
    const int32_t* offset = nullptr;  // of int8: what each output's sum is too large by
    const float* bias = nullptr;      // [outputs, padded]
};

}  // namespace kvspn
