// What a decoder and its draft network are made of, apart from their weights: plans are made by it.
#pragma once

#include <cstdint>

#include "kvspn.h"

namespace kvspn {

// Of a feed-forward network. swiglu: silu(gate) * other, of two halves of a matrix's outputs.
enum class Activation : int32_t { none, gelu, swiglu };

struct Architecture {
    // Throws InvalidArgument.
    explicit Architecture(const kvspn_engine_params& params);

    Activation activation() const { return gated ? Activation::swiglu : Activation::gelu; }

    int layers, heads;
    int key_heads;      // of keys and values: heads / key_heads of queries share one
    bool rms_norm;      // in place of LayerNorm: no mean is taken off, and there is no bias
    float norm_eps;     // added to the variance
    bool gated;         // SwiGLU in place of GELU
    float rotary_base;  // of the angles that queries and keys are turned by; 0: positions have embeddings
    bool cross;         // attends to an encoder
    int blocks, groups;
    bool last_layer_only;
    int encoder_stride;
};

}  // namespace kvspn
