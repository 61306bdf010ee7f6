// The decoder step as a list of stages, which host and device read alike.
#pragma once

#include <cstdint>

#include "common/accept.h"
#include "common/plan.h"
#include "common/rule.h"

namespace kvspn::cuda {

constexpr int kThreads =
    256;                   // of a block on the device, one block a multiprocessor: up to 255 registers each
constexpr int kTile = 16;  // rows that share one reading of the weights
constexpr int kKinds = 2;  // of tokens under a grammar of timestamps: text, and they; else all are text
constexpr int kMoments = 2 * kTile;  // floats in front of a block's activations: mean and factor of each row
constexpr int kMaxBatch = 256;       // rows of a batch
constexpr int kMaxHeadBytes = 512;   // of one position's key: what a warp loads at once

// 16-byte loads of keys, and of values, that a lane has under way: of int8, as many positions as of fp16.
constexpr int kFloatLoads = 8, kInt8Loads = 4;
inline int loads_of(Dtype kv) { return kv == Dtype::int8 ? kInt8Loads : kFloatLoads; }

// Lanes that share a position, 16 bytes each.
inline int lanes_of(int64_t head_bytes) {
    int lanes = 1;
    while (lanes * 16 < head_bytes) lanes *= 2;
    return lanes;
}

// Floats of a partial result of attention: the largest score, the sum of weights, two unused; then the
// columns.
constexpr int kPartialHead = 4;
inline int pitch_of_partial(int64_t width) { return kPartialHead + int(width + 3) / 4 * 4; }

struct alignas(16) Stage {
    Kind kind{};
    Dtype dtype{};       // of the weight; attend: of keys and values
    bool draft = false;  // embed, verify: for the draft network

    // linear, verify: y = [LayerNorm ->] x W^T * scale + bias [-> GELU] [+ y]. attend: x are queries.
    const float *x = nullptr, *norm_weight = nullptr, *norm_bias = nullptr, *scale = nullptr, *bias = nullptr;
    float* y = nullptr;
    const char* weight = nullptr;  // [outputs, pitch bytes], rows filled up with zeros
    int64_t x_stride = 0, y_stride = 0, pitch = 0;
    int32_t inputs = 0, outputs = 0;
    int32_t groups = 0, group_shift = 0;  // int4: scale is [outputs, groups], of 2^group_shift inputs each
    bool gelu = false, accumulate = false;

    // linear: outputs from `kept` on are keys, then values, and go to the cache of one layer, unless it is of
    // int8. attend: the cache of `layers` layers, under one softmax; of int8, a causal one appends first.
    char* kv = nullptr;
    float* kv_scale = nullptr;                                               // of int8, for each position
    int32_t kept = 0, capacity = 0, layers = 1, query_heads = 0, lanes = 0;  // lanes of a position
    bool causal = false, cross = false;
    bool queries = false;  // linear: kv is where the batch wants its outputs too, fp32 [B, capacity, outputs]
};

// Keys in memory, with the way to their values (part); strides count elements.
struct KeyValues {
    const void* keys;
    int64_t layer, part, row, head, position;
    int32_t capacity;
};

struct Attention {
    KeyValues cache, tail, scales;  // scales: of a cache of int8, fp32, one for each position
    int32_t slots, queries, heads, sharing, width, layers;  // sharing: query heads of one head of keys
    int32_t lanes;                                          // of a position
    bool causal;                                            // query i sees length + i + 1 positions
    float scale;
    int32_t pitch;     // of a partial result, in floats
    float* partials;   // [slots, heads, splits, queries * sharing, pitch]
    int32_t* arrived;  // [slots, heads], zeros
};

struct Table {
    Dtype dtype;
    const void* rows;
    int32_t count;
};

// What may change from one step to the next without a new graph.
struct Control {
    const float* mask;
    StopRule rule;
    const int32_t* drafts;  // [batch, drafts_b], the caller's; or null: the draft network's
    int64_t drafts_b;
    const float* first_mask;
    float* log_probs;  // [batch, ids] of the caller, or null
};

// A block's part of a row's logits of one kind: its best of them as a key, with its logit; the largest, and
// the sum of exponentials over it; how many go ahead of the row's draft.
struct Part {
    uint64_t best;
    float logit, largest, sum;
    int32_t above;
};

// When the first block had done its part of a stage, and when it went on behind the barrier, in cycles of its
// multiprocessor. Two more, of a step's start and end, tell what a cycle is: the device's nanoseconds,
// cycles.
struct Stamp {
    int64_t done, passed;
};

// Tables, the caller's batch, and the engine's own state.
struct Model {
    Table tokens, positions;
    const int32_t* draft_ids;
    int32_t width, heads, head_dim;
    int32_t encoder_stride;  // of the positions that the draft network attends to

    Dtype kv_dtype;
    int32_t *lengths, *ids, *stats;
    const int32_t* cross_lengths;
    bool* finished;
    int32_t batch, capacity, id_capacity;

    const Control* control;
    float* x;
    int64_t x_stride;
    uint64_t *best, *draft_best;  // [rows], [batch]: the largest logit and the smallest id that has it
    int32_t* above;               // [rows]: tokens in front of the draft
    const RowRule* rules;         // [batch]
    Part* parts;                  // [blocks, kKinds, parts_stride], of parted rows
    float* scores;                // [parts_stride, 2], of scored rows: log-sum-exp, logit of the choice
    float* draft_logits;          // [rows], of scored ones
    float* kept;                  // [rows, kept_stride], masked logits of rows that are cut
    int64_t kept_stride;
    int32_t draft_outputs;  // of the draft network's head
    int64_t parts_stride;
    int32_t blocks;   // of a grid
    int32_t* drafts;  // [batch, kMostQueries - 1]: of the present step; -1: no token
    int32_t partial_pitch;
    float* partials;   // of attention: [batch, heads, splits, queries, partial_pitch]
    int32_t* arrived;  // [batch, heads]
    uint32_t* barrier;
    Stamp* stamps;          // [start, stages..., end] of the last step; or null
    int32_t* progress;      // [batch, 1 + ids], in the host's memory: how many tokens a row has, and they
    int32_t shared_floats;  // of activations and their moments, in a block
};

}  // namespace kvspn::cuda
