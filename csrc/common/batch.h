// The caller's batch, checked; the same for every kind of device.
#pragma once

#include "common/tensor.h"
#include "common/weights.h"

namespace kvspn {

// [L, 2, B, H, capacity, D], and of int8 the scales [L, 2, B, H, capacity]; lengths [B].
struct Cache {
    char* values;
    float* scales;
    int32_t* lengths;
    int capacity;
};

struct Batch {
    Dtype dtype;  // of the caches
    Cache self, cross;
    int32_t *tokens, *stats;
    uint8_t* finished;
    int rows, token_capacity;
    int layers, heads, head_dim;
    float* queries;      // of cross-attention, [L, B, query_capacity, H * D]; or null
    int query_capacity;  // at least self.capacity

    // Which [capacity, D] of a cache.
    int64_t plane(int layer, int part, int row, int head) const {
        return ((int64_t(layer) * 2 + part) * rows + row) * heads + head;
    }
    // Of one layer, to keep and to read: its values, and its scales or null.
    char* values_of(const Cache& cache, int layer) const {
        return cache.values + plane(layer, 0, 0, 0) * cache.capacity * head_dim * int64_t(size_of(dtype));
    }
    float* scales_of(const Cache& cache, int layer) const {
        return cache.scales ? cache.scales + plane(layer, 0, 0, 0) * cache.capacity : nullptr;
    }
    float* queries_of(int layer, int row, int64_t position) const {
        return queries + ((int64_t(layer) * rows + row) * query_capacity + position) * heads * head_dim;
    }
    size_t bytes_of(const Cache& cache) const {
        return size_t(plane(layers, 0, 0, 0) * cache.capacity * head_dim) * size_of(dtype);
    }
};

// Throws InvalidArgument unless dtypes, shapes and strides are those that kvspn.h asks for.
Batch check_batch(const kvspn_batch& batch, const Weights& weights);

}  // namespace kvspn
