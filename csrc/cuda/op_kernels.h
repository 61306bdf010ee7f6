// Single ops on the caller's tensors: what their kernels are given, and the launches.
#pragma once

#include "cuda/kernels.h"
#include "kvspn.h"

namespace kvspn::cuda {

struct LinearOp {
    kvspn_linear_params p;
    Stage weights;
    bool aligned;                // rows of weights, to 16 bytes; else they are read element by element
    bool by_four, norm_by_four;  // elements of x and of the LayerNorm, in one load
    int32_t shared_floats;
};

struct VerifyOp {
    kvspn_verify_params p;
    Stage weights;
    bool aligned, by_four, norm_by_four;
    int32_t shared_floats;
    uint64_t* best;            // [rows], zeros
    int32_t *above, *arrived;  // [rows] and [1], zeros
    Part* parts;               // [blocks, kKinds, rows] where rows are scored, listed or have rules, or null
    float* kept;               // [rows, outputs] where rows are listed or may be cut, or null
};

struct AttentionOp {
    kvspn_tensor q, out;
    Dtype dtype;  // of keys and values
    const int32_t *lengths, *tail_lengths;
    Attention attention;  // of some queries, the first of which is
    int32_t first;
    bool aligned;  // positions of the cache and of the tail
    bool by_four;  // elements of q
};

struct AppendOp {
    kvspn_append_params p;
    int32_t unit;           // bytes that are copied at once, which divide a position's; 1: they become int8
    int32_t units;          // of a position, a thread's each; of int8 16 columns, and a power of two
    bool aligned, by_four;  // of int8: positions of the cache; elements of k and v
};

// The present device, with what the ops' kernels may use of it.
Device open_device_for_ops();

// Floats of activations that a block has room for.
int shared_floats_of_ops(const Device& device);

void launch(const Device& device, const LinearOp& op, cudaStream_t stream);
void launch(const Device& device, const VerifyOp& op, cudaStream_t stream);
void launch(const Device& device, const AttentionOp& op, cudaStream_t stream);

void launch(const Device& device, const AppendOp& op, cudaStream_t stream);
void launch_accept(const Device& device, const kvspn_accept_params& p, cudaStream_t stream);
// `unit`: bytes that are copied at once, which divide a position's. `held`: [2 L, B, M, H, D], what is on its
// way.
void launch_compact(const Device& device, const kvspn_compact_params& p, int unit, char* held,
                    cudaStream_t stream);

}  // namespace kvspn::cuda
