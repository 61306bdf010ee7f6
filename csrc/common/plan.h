// The order of a model's work, made once from its weights: lists of stages, which every device walks. There
// is no second place that knows the order of a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "common/weights.h"

namespace kvspn {

constexpr int kMostQueries = 16;             // of a row in one pass
constexpr int kPrefillChunk = kMostQueries;  // tokens of a prompt in one pass

enum class Kind : int32_t { embed, linear, attend, verify, accept };

// Where a stage's rows of activations are.
enum class Place : int32_t {
    none,
    states,    // of the encoder
    residual,  // x: what layers add to
    wide,      // queries, or queries, keys and values
    attended,
    inner,  // of a feed-forward network
    cross,  // the cross-attention cache of the stage's layer
};

struct Stage {
    const char* name = "";
    Kind kind{};
    bool draft = false;  // of the draft network
    // linear, verify: to = [norm ->] from W^T + bias [-> activation] [+ to].
    Place from = Place::none, to = Place::none;
    const Norm* norm = nullptr;
    const Matrix* matrix = nullptr;
    Activation activation = Activation::none;
    bool accumulate = false;
    bool keys = false;     // the last outputs are keys and values of `layer`, the encoder's where to is cross
    bool queries = false;  // the outputs are queries of `layer`'s cross-attention, which a batch may want
    // attend: wide -> attended, to `layers` layers from `layer` on under one softmax. causal: to the row's
    // own keys too, which it appends. cross: to the encoder's.
    int layer = 0, layers = 1, query_heads = 0;
    bool causal = false, cross = false;
};

struct Plan {
    explicit Plan(const Weights& weights);

    // What a step walks: the draft network from the start on, the base model from `base`, and from `judge`
    // what chooses. A prefill is what lies between `base` and `judge`, a plain step all from `base` on.
    std::vector<Stage> stages;
    int base = 0, judge = 0;
    std::vector<Stage> encode;  // the encoder's states -> keys and values of every layer
};

// What of its tokens a pass processes: of every unfinished row the newest and queries - 1 drafts; or, where
// `row` is one, `queries` of its tokens from `position` on.
struct Pass {
    int32_t row = -1, position = 0, queries = 1;
};

}  // namespace kvspn
