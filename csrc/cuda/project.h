// Rows of activations times a matrix of weights, whose outputs the warps of the grid share out.
//
// A source tells the rows: four(row, column), whose elements past the last column do not matter; and their
// LayerNorm: normed(), norm_weight(column), norm_bias(column), eps().
#pragma once

#include "cuda/grid.h"

namespace kvspn::cuda {

// Where four columns of a row of activations are kept for weights that come E to a load: a warp reads them,
// as the weights, without a bank conflict.
template <int E>
__device__ __forceinline__ int place_of(int column) {
    constexpr int kGroup = 32 * E;
    const int group = column / kGroup * kGroup, in_group = column % kGroup;
    return group + in_group % E / 4 * 128 + in_group / E * 4;
}

// Rows of the source, through the LayerNorm if there is one, to the block's x, filled up with zeros to
// `columns`.
template <int E, class Source>
__device__ __forceinline__ void load_rows(const Source& source, int inputs, int first, int count, int columns,
                                          float* x) {
    for (int r = warp(); r < count; r += warps()) {
        float* row = x + r * columns;
        float sum = 0;
#pragma unroll 8
        for (int c = 4 * lane(); c < columns; c += 128) {
            float4 v{0, 0, 0, 0};
            if (c < inputs) v = source.four(first + r, c);
            v.y = c + 1 < inputs ? v.y : 0, v.z = c + 2 < inputs ? v.z : 0, v.w = c + 3 < inputs ? v.w : 0;
            sum += v.x + v.y + (v.z + v.w);
            *reinterpret_cast<float4*>(row + place_of<E>(c)) = v;
        }
        if (!source.normed()) continue;
        const float mean = sum_of_warp(sum) / float(inputs);
        float squares = 0;
        for (int c = 4 * lane(); c < inputs; c += 128) {
            const float* v = row + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < inputs) squares = fmaf(v[i] - mean, v[i] - mean, squares);
        }
        const float factor = 1.f / sqrtf(sum_of_warp(squares) / float(inputs) + source.eps());
        for (int c = 4 * lane(); c < inputs; c += 128) {
            float* v = row + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < inputs)
                    v[i] = fmaf((v[i] - mean) * factor, source.norm_weight(c + i), source.norm_bias(c + i));
        }
    }
    sync_block();
}

// A lane's part of output n's product with R rows of activations, of which `rows` are there.
template <class W, int R, bool kAligned>
__device__ __forceinline__ void dot(const Stage& s, int64_t n, const float* x, int columns, int rows,
                                    float (&sum)[R]) {
    constexpr int E = kPerLoad<W>, kUnroll = 4;
    const char* weight = s.weight + n * s.pitch;
    const int bytes = std::is_same_v<W, Nibbles> ? s.inputs / 2 : s.inputs * int(sizeof(W));
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = 0;
    for (int from = 0; from < bytes; from += 512 * kUnroll) {
        uint4 w[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int at = from + 512 * u + 16 * lane();
            w[u] = uint4{0, 0, 0, 0};
            if (at < bytes) w[u] = kAligned ? load_weights(weight + at) : load_elements<W>(weight, at, bytes);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int column = (from / 16 + 32 * u) * E;
            if (column >= columns) continue;
            float values[E];
            unpack(w[u], values, W{});
            if constexpr (std::is_same_v<W, Nibbles>) {
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    const int at = column + lane() * E + e;
                    const int group = kAligned ? (at - e % 8) >> s.group_shift : at / (s.inputs / s.groups);
                    values[e] *= s.scale[n * s.groups + min(group, s.groups - 1)];
                }
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (r < rows) {
#pragma unroll
                    for (int p = 0; p < E / 4; ++p) {
                        const float4 v =
                            *reinterpret_cast<const float4*>(x + r * columns + column + 4 * lane() + 128 * p);
                        sum[r] = fmaf(values[4 * p], v.x, sum[r]);
                        sum[r] = fmaf(values[4 * p + 1], v.y, sum[r]);
                        sum[r] = fmaf(values[4 * p + 2], v.z, sum[r]);
                        sum[r] = fmaf(values[4 * p + 3], v.w, sum[r]);
                    }
                }
            }
        }
    }
}

// The lanes' parts -> row lane / (32 / R)'s sum; the tree of additions is the same for every R.
template <int R>
__device__ __forceinline__ float reduce(float (&sum)[R]) {
    constexpr int kLevels = R == 1 ? 0 : R == 2 ? 1 : 4;
    static_assert(1 << kLevels == R);
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
        const int half = R >> (level + 1), mask = 16 >> level;
        const bool upper = lane() & mask;
#pragma unroll
        for (int r = 0; r < R / 2; ++r) {
            if (r >= half) continue;
            const float given = upper ? sum[r] : sum[r + half], kept = upper ? sum[r + half] : sum[r];
            sum[r] = kept + from_lane_xor(given, mask);
        }
    }
#pragma unroll
    for (int level = kLevels; level < 5; ++level) sum[0] += from_lane_xor(sum[0], 16 >> level);
    return sum[0];
}

// Rows of activations pass by tile by tile; `start(first, count)` runs when a tile is in the block's memory,
// `output(n, r, value)` for each output and row of it, on all lanes that have the value.
template <class W, int R, bool kAligned, class Source, class Start, class Output>
__device__ __forceinline__ void project(const Stage& s, const Source& source, int rows, float* x,
                                        int shared_floats, Start start, Output output) {
    constexpr int E = kPerLoad<W>;
    const int columns = (max(s.inputs, 1) + 32 * E - 1) / (32 * E) * (32 * E);
    const int tile = min(R, shared_floats / columns);
    for (int first = 0; first < rows; first += tile) {
        const int count = min(tile, rows - first);
        load_rows<E>(source, s.inputs, first, count, columns, x);
        start(first, count, columns);
        for (int n = grid_warp(); n < s.outputs; n += grid_warps()) {
            float sum[R];
            dot<W, R, kAligned>(s, n, x, columns, count, sum);
            float value = reduce<R>(sum);
            if (std::is_same_v<W, int8_t>) value *= s.scale[n];
            const int r = lane() / (32 / R);
            if (r < count) output(n, first + r, value);
        }
        sync_block();
    }
}

}  // namespace kvspn::cuda
