// The CPU kernels behind one table, a table for each instruction set.
//
// All work on fp32 activations. A row's result does not depend on the other rows or on the range of outputs:
// every output is one fixed chain of operations on one thread.
#pragma once

#include <cstdint>

#include "common/matrix.h"
#include "common/rule.h"

namespace kvspn {

constexpr int kQueries = 4;  // that share one reading of keys and values

// W as the caller holds it: rows of K elements; of int4, of K / 2 bytes, the first column in the lowest bits.
// Its values are widened to floats, and the sums of a row's groups of columns take their scales.
struct RowMatrix {
    Dtype dtype = Dtype::fp32;
    const void* weight = nullptr;
    int64_t stride = 0;  // elements (int4: bytes) from a row to the next
    const float* scale = nullptr;
    int64_t scale_stride = 0;
    int groups = 1;
    int inputs = 0;
};

// Rows of activations; for an integer matrix also as int16, each row with its scale.
struct Rows {
    const float* x = nullptr;
    int64_t stride = 0;
    int count = 0;
    const int16_t* quantised = nullptr;
    int64_t quantised_stride = 0;
    const float* scales = nullptr;

    Rows from(int r) const {
        return {x + r * stride,   stride,    count - r, quantised + r * quantised_stride,
                quantised_stride, scales + r};
    }
};

// Attention of up to kQueries queries, under one softmax, to the keys of `layers` layers and to a tail.
struct Attention {
    Dtype dtype = Dtype::fp32;
    const void *keys = nullptr, *values = nullptr;               // of the first layer: [positions, width]
    const void *tail_keys = nullptr, *tail_values = nullptr;     // [tail_length, width]
    int64_t stride = 0, tail_stride = 0;                         // elements from a position to the next
    int64_t layer_stride = 0;                                    // and from a layer to the next
    const float *key_scales = nullptr, *value_scales = nullptr;  // of int8, without a tail: [positions]
    int64_t scale_layer_stride = 0;
    int layers = 1, tail_length = 0;
    int width = 0;
    float scale = 1;
    int queries = 0;
    int lengths[kQueries] = {};  // positions of each layer that each query sees
    const float* q[kQueries] = {};
    float* out[kQueries] = {};
    float* scores = nullptr;  // scratch [kQueries, layers * pad(longest) + pad(tail_length)]
};

// Of a row of logits: the largest, the first of equals, and how many tokens stand in front of the draft.
struct Best {
    float value = -__builtin_inff();
    int32_t id = -1;   // none above -inf
    bool nan = false;  // among the logits: then the rest means nothing
    float draft_value = 0;
    int32_t draft = -1;  // none
    int32_t above = 0;
    float logit = -__builtin_inff(), draft_logit = logit;  // of both, without the noise of sampling
    float log_sum_exp = 0;                                 // of all logits, where that is asked for
};

// The sum of exponentials of some logits, over that of the largest.
struct Partition {
    float largest, sum;
};

struct Kernels {
    const char* name;
    // Outputs first .. last of every row: y[row * y_stride + output] = or += (accumulate).
    void (*linear)(const Matrix& matrix, const Rows& rows, int first, int last, float* y, int64_t y_stride,
                   bool accumulate);
    // The same, y = x W^T, for `count` rows x.
    void (*linear_by_rows)(const RowMatrix& matrix, const float* x, int64_t x_stride, int count, int first,
                           int last, float* y, int64_t y_stride);
    // x [count] -> int16, zeros behind it up to `padded`; returns the scale.
    float (*quantise)(const float* x, int count, int padded, int16_t* out);
    // x [count] -> int8; returns the scale.
    float (*quantise_int8)(const float* x, int count, int8_t* out);
    // x [count] -> fp32, bf16 or fp16, rounded to nearest.
    void (*narrow)(Dtype dtype, const float* x, int count, void* out);
    void (*attend)(const Attention& attention);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int width, float eps,
                       float* y);
    void (*rms_norm)(const float* x, const float* weight, int width, float eps, float* y);
    void (*gelu)(float* x, int count);
    void (*swiglu)(float* gate, const float* x, int count);  // gate = silu(gate) * x
    // More logits of a row, of tokens first, first + 1, ...; mask [count], or null, is added.
    void (*judge)(const float* logits, const float* mask, int first, int count, Best& best);
    // Logits of tokens first, first + 1, ..., or of those of `ids`, -> what they count as under a row's rule,
    // at an index of the row.
    void (*disturb)(const float* logits, const RowRule& rule, int32_t index, const int32_t* ids, int first,
                    int count, float* out);
    Partition (*partition)(const float* logits, int count);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512vnni_kernels;

// The best that the machine has, or the variant by its name; the environment's KVSPN_CPU overrides both. What
// only the encoder knows ("avx512bf16", "amx") stands for the best below it.
const Kernels& select_kernels(const char* variant);

}  // namespace kvspn
