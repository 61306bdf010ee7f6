// Rows of activations times a matrix of weights, whose outputs the warps of the grid share out.
//
// A source tells the rows: four(row, column), whose elements past the last column do not matter; and their
// LayerNorm: normed(), norm_weight(column) and norm_bias(column), four at a time, eps().
//
// What a stage reads and the one before has not made is asked for before anything waits for it: memory and
// the L2 cache then answer side by side, and not one after the other.
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

// Rows of the source to the block's x, filled up with zeros to `columns`. R: rows at most.
template <int E, int R, class Source>
__device__ __forceinline__ void copy_rows(const Source& source, int inputs, int first, int count, int columns,
                                          float* x) {
    constexpr int kRows = R > 2 ? 4 : 2, kTimes = 4 / kRows;  // four loads of a thread under way
    const int step = 4 * thread_count();
    for (int top = 0; top < count; top += kRows) {
        for (int left = 4 * thread_index(); left < columns; left += kTimes * step) {
            float4 v[kRows][kTimes];
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kTimes; ++j) {
                    const int c = left + j * step;
                    v[i][j] = float4{0, 0, 0, 0};
                    if (top + i < count && c < inputs) v[i][j] = source.four(first + top + i, c);
                }
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kTimes; ++j) {
                    const int c = left + j * step;
                    if (top + i >= count || c >= columns) continue;
                    float4 four = v[i][j];
                    four.y = c + 1 < inputs ? four.y : 0, four.z = c + 2 < inputs ? four.z : 0;
                    four.w = c + 3 < inputs ? four.w : 0;
                    *reinterpret_cast<float4*>(x + (top + i) * columns + place_of<E>(c)) = four;
                }
        }
    }
}

// Mean and factor of the LayerNorm of the block's rows, a warp each: moments[0 .. count), [kTile .. + count).
template <int E, class Source>
__device__ __forceinline__ void find_moments(const Source& source, int inputs, int count, int columns,
                                             const float* x, float* moments) {
    for (int r = warp(); r < count; r += warps()) {
        const float* row = x + r * columns;
        float sum = 0;
#pragma unroll 8
        for (int c = 4 * lane(); c < columns; c += 128) {
            const float4 v = *reinterpret_cast<const float4*>(row + place_of<E>(c));
            sum += v.x + v.y + (v.z + v.w);
        }
        const float mean = sum_of_warp(sum) / float(inputs);
        float squares = 0;
#pragma unroll 8
        for (int c = 4 * lane(); c < inputs; c += 128) {
            const float* v = row + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < inputs) squares = fmaf(v[i] - mean, v[i] - mean, squares);
        }
        const float variance = sum_of_warp(squares) / float(inputs);
        if (lane() == 0) moments[r] = mean, moments[kTile + r] = 1.f / sqrtf(variance + source.eps());
    }
}

// Rows of the source, through the LayerNorm if there is one, to the block's x. Its weights are asked for
// together with the rows.
template <int E, int R, class Source>
__device__ __forceinline__ void load_rows(const Source& source, int inputs, int first, int count, int columns,
                                          float* x, float* moments) {
    const int start = 4 * thread_index(), step = 4 * thread_count();
    float4 weight{}, bias{};
    if (source.normed() && start < inputs) weight = source.norm_weight(start), bias = source.norm_bias(start);
    copy_rows<E, R>(source, inputs, first, count, columns, x);
    sync_block();
    if (!source.normed()) return;
    find_moments<E>(source, inputs, count, columns, x, moments);
    sync_block();
    for (int c = start; c < inputs; c += step) {
        const float w[4] = {weight.x, weight.y, weight.z, weight.w}, b[4] = {bias.x, bias.y, bias.z, bias.w};
        if (c + step < inputs) weight = source.norm_weight(c + step), bias = source.norm_bias(c + step);
        for (int r = 0; r < count; ++r) {
            float* v = x + r * columns + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < inputs) v[i] = fmaf((v[i] - moments[r]) * moments[kTile + r], w[i], b[i]);
        }
    }
    sync_block();
}

// What an output gets beside its product.
struct Added {
    float bias, residual;
};

// Whether an output has a scale.
template <class W>
constexpr bool kScaled = std::is_same_v<W, int8_t> || std::is_same_v<W, Fp8>;

constexpr int kTurn = 4;  // loads of a lane, of one output, that are under way together

template <class W>
__device__ __forceinline__ int bytes_of(const Stage& s) {
    return std::is_same_v<W, Nibbles> ? s.inputs / 2 : s.inputs * int(sizeof(W));
}

// A lane's part of an output's weights from byte `at` on.
template <class W, bool kAligned>
__device__ __forceinline__ void load_turn(const Stage& s, int output, int at, uint4 (&weights)[kTurn]) {
    const char* row = s.weight + output * s.pitch;
    const int bytes = bytes_of<W>(s);
#pragma unroll
    for (int u = 0; u < kTurn; ++u) {
        const int from = at + 512 * u + 16 * lane();
        weights[u] = uint4{0, 0, 0, 0};
        if (output < s.outputs && from < bytes)
            weights[u] = kAligned ? load_weights(row + from) : load_elements<W>(row, from, bytes);
    }
}

// Adds its product with R rows of activations, of which `rows` are there.
template <class W, int R, bool kAligned>
__device__ __forceinline__ void multiply(const Stage& s, const uint4 (&weights)[kTurn], int output, int at,
                                         const float* x, int columns, int rows, float (&sum)[R]) {
    constexpr int E = kPerLoad<W>;
#pragma unroll
    for (int u = 0; u < kTurn; ++u) {
        const int column = (at / 16 + 32 * u) * E;
        if (column >= columns) continue;
        float values[E];
        unpack(weights[u], values, W{});
        if constexpr (std::is_same_v<W, Nibbles>) {
#pragma unroll
            for (int e = 0; e < E; ++e) {
                const int c = column + lane() * E + e;
                const int group = kAligned ? (c - e % 8) >> s.group_shift : c / (s.inputs / s.groups);
                values[e] *= s.scale[int64_t(output) * s.groups + min(group, s.groups - 1)];
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

// One output's product with one row of the block, on all lanes.
template <class W, bool kAligned>
__device__ __forceinline__ float dot(const Stage& s, int output, const float* x, int columns) {
    const float scale = kScaled<W> ? s.scale[output] : 1.f;
    float sum[1] = {};
    for (int at = 0; at < bytes_of<W>(s); at += 512 * kTurn) {
        uint4 weights[kTurn];
        load_turn<W, kAligned>(s, output, at, weights);
        multiply<W, 1, kAligned>(s, weights, output, at, x, columns, 1, sum);
    }
    return reduce<1>(sum) * scale;
}

// Rows of activations pass by tile by tile; `start(first, count, columns)` runs when a tile is in the block's
// memory. For each output and row of it, begin(n, row) loads what end(n, row, value, begun) needs beside the
// product, both on all lanes that have the value.
//
// A warp goes through its outputs turn by turn. Two are under way, each in registers of its own; one where
// these are needed for the sums of many rows or the many weights of a load.
template <class W, int R, bool kAligned, class Source, class Start, class Begin, class End>
__device__ __forceinline__ void project(const Stage& s, const Source& source, int rows, float* memory,
                                        int shared_floats, Start start, Begin begin, End end) {
    constexpr int E = kPerLoad<W>, kTurns = R > 2 || E > 8 ? 1 : 2;
    float *moments = memory, *x = memory + kMoments;
    const int columns = (max(s.inputs, 1) + 32 * E - 1) / (32 * E) * (32 * E), bytes = bytes_of<W>(s);
    const int tile = min(R, (shared_floats - kMoments) / columns);
    for (int first = 0; first < rows; first += tile) {
        const int count = min(tile, rows - first), own = lane() / (32 / R);
        struct {
            int output, at;
            uint4 weights[kTurn];
            float scale;
            decltype(begin(0, 0)) begun;
        } turns[kTurns];
        int output = grid_warp(), at = 0;  // of the next turn
        const auto fetch = [&](auto& turn) {
            turn.output = output, turn.at = at;
            load_turn<W, kAligned>(s, output, at, turn.weights);
            at += 512 * kTurn;
            if (at < bytes) return;
            if (output < s.outputs && own < count) {
                turn.begun = begin(output, first + own);
                if (kScaled<W>) turn.scale = s.scale[output];
            }
            output += grid_warps(), at = 0;
        };
#pragma unroll
        for (auto& turn : turns) fetch(turn);
        load_rows<E, R>(source, s.inputs, first, count, columns, x, moments);
        start(first, count, columns);
        float sum[R] = {};
        while (turns[0].output < s.outputs) {
#pragma unroll
            for (auto& turn : turns) {
                if (turn.output >= s.outputs) break;
                multiply<W, R, kAligned>(s, turn.weights, turn.output, turn.at, x, columns, count, sum);
                if (turn.at + 512 * kTurn >= bytes) {
                    float value = reduce<R>(sum);
                    if (kScaled<W>) value *= turn.scale;
                    if (own < count) end(turn.output, first + own, value, turn.begun);
#pragma unroll
                    for (int r = 0; r < R; ++r) sum[r] = 0;
                }
                fetch(turn);
            }
        }
        sync_block();
    }
}

}  // namespace kvspn::cuda
