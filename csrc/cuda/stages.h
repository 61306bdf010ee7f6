// The stages of a decoder step. A whole grid runs a stage; what one writes, the next reads after a barrier.
//
// A row's result does not depend on the other rows, the number of blocks or the order of threads: an output
// is the work of one warp, in one order; splits of the cache have one size and are combined in their order.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace kvspn::cuda {

// The rows of a pass.
struct Slots {
    int32_t count;
    int32_t row[kMaxBatch], position[kMaxBatch];
};

// A block's memory; activations lie behind it.
struct Shared {
    Slots slots;
    uint64_t best[kThreads / 32][kTile];
    int32_t above[kThreads / 32][kTile];
    float draft_logit[kTile];
    int32_t draft[kTile];
};

__device__ __forceinline__ int lane() { return thread_index() & 31; }
__device__ __forceinline__ int warp() { return thread_index() >> 5; }
__device__ __forceinline__ int warps() { return thread_count() >> 5; }
// Neighbouring outputs are on different multiprocessors.
__device__ __forceinline__ int grid_warp() { return warp() * block_count() + block_index(); }
__device__ __forceinline__ int grid_warps() { return warps() * block_count(); }

// What other blocks may have written: past the L1 cache.
#if defined(__CUDACC__)
template <class T>
__device__ __forceinline__ T fresh(const T* from) {
    return __ldcg(from);
}
#else
template <class T>
T fresh(const T* from) {
    return *from;
}
#endif

// Calls body(a value of the type).
template <class Body>
__device__ __forceinline__ void with_float(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::fp16:
            return body(Half{});
        case Dtype::bf16:
            return body(Bfloat{});
        default:
            return body(float{});
    }
}
template <class Body>
__device__ __forceinline__ void with_weight(Dtype dtype, Body body) {
    if (dtype == Dtype::int8) return body(int8_t{});
    dtype == Dtype::int4 ? body(Nibbles{}) : with_float(dtype, body);
}

__device__ __forceinline__ float sum_of_warp(float value, int lanes = 1) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        if (mask >= lanes) value += from_lane_xor(value, mask);
    return value;
}
__device__ __forceinline__ float max_of_warp(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value = fmaxf(value, from_lane_xor(value, mask));
    return value;
}

// Every block finds the pass's rows itself, which is cheaper than a barrier. A row with an absurd length is
// left alone.
__device__ __forceinline__ void collect(const Model& m, const Pass& pass, Slots& slots) {
    if (pass.row >= 0) {
        if (thread_index() == 0) slots.count = 1, slots.row[0] = pass.row, slots.position[0] = pass.position;
    } else {
        for (int b = thread_index(); b < m.batch; b += thread_count()) {
            const int length = fresh(m.lengths + b);
            const bool ready = !fresh(reinterpret_cast<const uint8_t*>(m.finished) + b) && length >= 0 &&
                               length < m.capacity && length < m.id_capacity;
            slots.position[b] = ready ? length : -1;
        }
        sync_block();
        if (thread_index() == 0) {
            int count = 0;
            for (int b = 0; b < m.batch; ++b) {
                if (slots.position[b] < 0) continue;
                slots.row[count] = b;
                slots.position[count++] = slots.position[b];
            }
            slots.count = count;
        }
    }
    sync_block();
}

// Order-preserving: a larger logit, then a smaller id, is a larger key. 0: none yet.
__device__ __forceinline__ uint64_t key_of(float logit, int id) {
    const uint32_t bits = as_bits(logit + 0.f);  // -0 becomes 0
    return uint64_t(bits & 0x80000000 ? ~bits : bits | 0x80000000) << 32 | (0xffffffff - uint32_t(id));
}
__device__ __forceinline__ int id_of(uint64_t key) { return int(0xffffffff - uint32_t(key)); }

__device__ __forceinline__ int draft_of(const Model& m, int batch_row) {
    const int id = id_of(fresh(m.draft_best + batch_row));
    return m.draft_ids ? m.draft_ids[id] : id;
}

__device__ __forceinline__ float element(const Table& table, int64_t index) {
    switch (table.dtype) {
        case Dtype::fp16:
            return to_float(static_cast<const Half*>(table.rows)[index]);
        case Dtype::bf16:
            return to_float(static_cast<const Bfloat*>(table.rows)[index]);
        default:
            return static_cast<const float*>(table.rows)[index];
    }
}

// x = the embedding of each token + that of its position; what the step's choices go into is cleared.
__device__ __forceinline__ void embed(const Model& m, const Stage& s, const Pass& pass, Shared& shared) {
    const Slots& slots = shared.slots;
    const int rows = slots.count * pass.queries;
    for (int r = block_index(); r < rows; r += block_count()) {
        const int slot = r / pass.queries, q = r % pass.queries, b = slots.row[slot];
        const int at = slots.position[slot] + q;
        int id = pass.row < 0 && q ? draft_of(m, b) : fresh(m.ids + int64_t(b) * m.id_capacity + at);
        id = min(max(id, 0), m.tokens.count - 1);
        // A draft past the last position is never emitted.
        const int64_t position = min(at, m.positions.count - 1);
        for (int c = thread_index(); c < m.width; c += thread_count())
            m.x[r * m.x_stride + c] =
                element(m.tokens, int64_t(id) * m.width + c) + element(m.positions, position * m.width + c);
        if (!s.draft && thread_index() == 0) m.best[r] = 0, m.above[r] = 0;
    }
}

// Where four columns of a row of activations are kept for weights that come E to a load: a warp reads them,
// as the weights, without a bank conflict.
template <int E>
__device__ __forceinline__ int place_of(int column) {
    constexpr int kGroup = 32 * E;
    const int group = column / kGroup * kGroup, in_group = column % kGroup;
    return group + in_group % E / 4 * 128 + in_group / E * 4;
}

// Rows of x, through the LayerNorm if there is one, to x of the block, filled up with zeros to `columns`.
template <int E>
__device__ __forceinline__ void load_rows(const Stage& s, int first, int count, int columns, float* x) {
    for (int r = warp(); r < count; r += warps()) {
        const float* from = s.x + (first + r) * s.x_stride;
        float* row = x + r * columns;
        float sum = 0;
#pragma unroll 8
        for (int c = 4 * lane(); c < columns; c += 128) {
            float4 v{0, 0, 0, 0};
            if (c < s.inputs) v = fresh(reinterpret_cast<const float4*>(from + c));
            v.y = c + 1 < s.inputs ? v.y : 0, v.z = c + 2 < s.inputs ? v.z : 0,
            v.w = c + 3 < s.inputs ? v.w : 0;
            sum += v.x + v.y + (v.z + v.w);
            *reinterpret_cast<float4*>(row + place_of<E>(c)) = v;
        }
        if (!s.norm_weight) continue;
        const float mean = sum_of_warp(sum) / float(s.inputs);
        float squares = 0;
        for (int c = 4 * lane(); c < s.inputs; c += 128) {
            const float* v = row + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < s.inputs) squares = fmaf(v[i] - mean, v[i] - mean, squares);
        }
        const float factor = 1.f / sqrtf(sum_of_warp(squares) / float(s.inputs) + 1e-5f);
        for (int c = 4 * lane(); c < s.inputs; c += 128) {
            float* v = row + place_of<E>(c);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i < s.inputs)
                    v[i] = fmaf((v[i] - mean) * factor, s.norm_weight[c + i], s.norm_bias[c + i]);
        }
    }
    sync_block();
}

// A lane's part of output n's product with R rows of activations, of which `rows` are there.
template <class W, int R>
__device__ __forceinline__ void dot(const Stage& s, int64_t n, const float* x, int columns, int rows,
                                    float (&sum)[R]) {
    constexpr int E = kPerLoad<W>, kUnroll = 4;
    const char* weight = s.weight + n * s.pitch;
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = 0;
    for (int from = 0; from < s.pitch; from += 512 * kUnroll) {
        uint4 w[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int at = from + 512 * u + 16 * lane();
            w[u] = at < s.pitch ? load_weights(weight + at) : uint4{0, 0, 0, 0};
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
                    const int group = min((column + lane() * E + e / 8 * 8) >> s.group_shift, s.groups - 1);
                    values[e] *= s.scale[n * s.groups + group];
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
template <class W, int R, class Start, class Output>
__device__ __forceinline__ void project(const Model& m, const Stage& s, int rows, float* x, Start start,
                                        Output output) {
    constexpr int E = kPerLoad<W>;
    const int columns = (s.inputs + 32 * E - 1) / (32 * E) * (32 * E);
    const int tile = min(R, m.shared_floats / columns);
    for (int first = 0; first < rows; first += tile) {
        const int count = min(tile, rows - first);
        load_rows<E>(s, first, count, columns, x);
        start(first, count, columns);
        for (int n = grid_warp(); n < s.outputs; n += grid_warps()) {
            float sum[R];
            dot<W, R>(s, n, x, columns, count, sum);
            float value = reduce<R>(sum);
            if (std::is_same_v<W, int8_t>) value *= s.scale[n];
            const int r = lane() / (32 / R);
            if (r < count) output(n, first + r, value);
        }
        sync_block();
    }
}

template <class W, int R>
__device__ __forceinline__ void linear(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                       float* x) {
    const Slots& slots = shared.slots;
    auto start = [](int, int, int) {};
    project<W, R>(m, s, slots.count * pass.queries, x, start, [&](int n, int r, float value) {
        if (lane() % (32 / R)) return;
        if (s.bias) value += s.bias[n];
        if (s.gelu) value = 0.5f * value * (1.f + erff(value * 0.70710678f));
        if (s.kv && n >= s.kept) {
            const int slot = r / pass.queries, position = slots.position[slot] + r % pass.queries;
            if (position >= s.capacity) return;
            const int of_values = (n - s.kept) / m.width, column = (n - s.kept) % m.width;
            const int64_t plane =
                (int64_t(of_values) * m.batch + slots.row[slot]) * m.heads + column / m.head_dim;
            const int64_t at = (plane * s.capacity + position) * m.head_dim + column % m.head_dim;
            with_float(m.kv_dtype,
                       [&](auto type) { store(reinterpret_cast<decltype(type)*>(s.kv) + at, value); });
        } else {
            float* y = s.y + r * s.y_stride + n;
            *y = s.accumulate ? fresh(y) + value : value;
        }
    });
}

// Logits of the rows, reduced to the best of each and the number of those in front of the draft.
template <class W, int R>
__device__ __forceinline__ void verify(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                       float* x) {
    const Slots& slots = shared.slots;
    const float* mask = m.control->mask;
    auto masked = [&](float logit, int n) {
        if (mask) logit += mask[s.draft && m.draft_ids ? m.draft_ids[n] : n];
        return logit == logit ? logit + 0.f : -INFINITY;
    };
    uint64_t best = 0;
    int above = 0, tile_first = 0, tile_rows = 0;
    auto finish = [&] {  // the block's result of a tile joins those of the others
        if (!tile_rows) return;
        if (lane() % (32 / R) == 0) {
            shared.best[warp()][lane() / (32 / R)] = best;
            shared.above[warp()][lane() / (32 / R)] = above;
        }
        sync_block();
        const int r = thread_index();
        if (r < tile_rows) {
            uint64_t key = 0;
            int count = 0;
            for (int w = 0; w < warps(); ++w) {
                key = key > shared.best[w][r] ? key : shared.best[w][r];
                count += shared.above[w][r];
            }
            atomic_max((s.draft ? m.draft_best + slots.row[tile_first + r] : m.best + tile_first + r), key);
            if (count) atomic_add(m.above + tile_first + r, count);
        }
        sync_block();
    };
    auto start = [&](int first, int count, int columns) {
        finish();
        best = 0, above = 0, tile_first = first, tile_rows = count;
        // The drafts' own logits come first, so that one reading of the head tells argmax and rank.
        for (int r = warp(); r < count; r += warps()) {
            const bool judges = !s.draft && (first + r) % pass.queries + 1 < pass.queries;
            int draft = judges ? draft_of(m, slots.row[(first + r) / pass.queries]) : -1;
            float logit = 0;
            if (draft >= 0) {
                float sum[1];
                dot<W, 1>(s, draft, x + r * columns, columns, 1, sum);
                logit = reduce<1>(sum);
                logit = masked(std::is_same_v<W, int8_t> ? logit * s.scale[draft] : logit, draft);
            }
            if (lane() == 0) shared.draft[r] = draft, shared.draft_logit[r] = logit;
        }
        sync_block();
    };
    project<W, R>(m, s, slots.count * pass.queries, x, start, [&](int n, int r, float value) {
        value = masked(value, n);
        const uint64_t key = key_of(value, n);
        best = key > best ? key : best;
        const int draft = shared.draft[r - tile_first];
        const float logit = shared.draft_logit[r - tile_first];
        above += draft >= 0 && (value > logit || (value == logit && n < draft));
    });
    finish();
}

// Queries [rows, heads, D] to the cache of one or more layers, split by layer and position. A warp holds a
// split's keys and values in registers while all queries pass by; the last warp of a row and head combines.
template <class KV>
__device__ __forceinline__ void attend(const Model& m, const Stage& s, const Pass& pass, Shared& shared) {
    constexpr int E = kPerLoad<KV>;
    const Slots& slots = shared.slots;
    const int D = m.head_dim, group = s.lanes, at_once = 32 / group, split = at_once * kLoads;
    const int part = lane() % group, place = lane() / group, sharing = s.query_heads / m.heads;
    const bool used = part * E < D;
    const int queries = pass.queries * sharing, most = s.layers * ((s.capacity + split - 1) / split);
    const int64_t plane = int64_t(s.capacity) * D, values_at = int64_t(m.batch) * m.heads * plane;
    const float scale = 1.f / sqrtf(float(D));
    const int pitch = 2 + D;

    for (int task = grid_warp(); task < most * slots.count * m.heads; task += grid_warps()) {
        const int head = task % m.heads, slot = task / m.heads % slots.count;
        const int index = task / m.heads / slots.count, row = slots.row[slot];
        const int base = s.cross ? m.cross_lengths[row] : slots.position[slot];
        const int limit = min(max(base + (s.causal ? pass.queries : 0), 0), s.capacity);
        const int per_layer = max(1, (limit + split - 1) / split), splits = s.layers * per_layer;
        if (index >= splits) continue;
        const int first = index % per_layer * split + place;
        const KV* keys = reinterpret_cast<const KV*>(s.kv) + index / per_layer * 2 * values_at +
                         (int64_t(row) * m.heads + head) * plane + part * E;
        uint4 k[kLoads], v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int t = first + i * at_once;
            k[i] = used && t < limit ? load_kv(keys + int64_t(t) * D) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int t = first + i * at_once;
            v[i] = used && t < limit ? load_kv(keys + values_at + int64_t(t) * D) : uint4{0, 0, 0, 0};
        }
        float* partials = m.partials + (int64_t(slot) * m.heads + head) * most * queries * pitch;
        for (int i = 0; i < queries; ++i) {
            const int query = i / sharing, query_head = head * sharing + i % sharing;
            const int seen = s.causal ? min(base + query + 1, limit) : limit;
            const float* from = s.x + (slot * pass.queries + query) * s.x_stride + query_head * D + part * E;
            float q[E], score[kLoads], most_score = -INFINITY;
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                const float4 four =
                    used ? fresh(reinterpret_cast<const float4*>(from + e)) : float4{0, 0, 0, 0};
                q[e] = four.x, q[e + 1] = four.y, q[e + 2] = four.z, q[e + 3] = four.w;
            }
#pragma unroll
            for (int l = 0; l < kLoads; ++l) {
                float key[E], product = 0;
                unpack(k[l], key, KV{});
#pragma unroll
                for (int e = 0; e < E; ++e) product = fmaf(q[e], key[e], product);
                for (int mask = group / 2; mask > 0; mask /= 2) product += from_lane_xor(product, mask);
                score[l] = first + l * at_once < seen ? product * scale : -INFINITY;
                most_score = fmaxf(most_score, score[l]);
            }
            most_score = max_of_warp(most_score);
            float total = 0, sum[E] = {};
#pragma unroll
            for (int l = 0; l < kLoads; ++l) {
                float value[E];
                unpack(v[l], value, KV{});
                // Not a product with 0: what a query does not see may be infinite.
                const bool sees = score[l] > -INFINITY;
                const float weight = sees ? expf(score[l] - most_score) : 0.f;
                total += weight;
#pragma unroll
                for (int e = 0; e < E; ++e) sum[e] = sees ? fmaf(weight, value[e], sum[e]) : sum[e];
            }
            total = sum_of_warp(total, group);
#pragma unroll
            for (int e = 0; e < E; ++e) sum[e] = sum_of_warp(sum[e], group);
            float* to = partials + (int64_t(index) * queries + i) * pitch;
            if (lane() == 0) to[0] = most_score, to[1] = total;
            if (place == 0 && used) {
#pragma unroll
                for (int e = 0; e < E; ++e) to[2 + part * E + e] = sum[e];
            }
        }
        sync_warp();
        int last = 0;
        if (lane() == 0) {
            int32_t* arrived = m.arrived + slot * m.heads + head;
            fence();
            last = atomic_add(arrived, 1) == splits - 1;
            if (last) *arrived = 0;
            fence();
        }
        if (!from_lane(last, 0)) continue;
        for (int i = 0; i < queries; ++i) {
            const int query = i / sharing, query_head = head * sharing + i % sharing;
            const float* from = partials + int64_t(i) * pitch;
            const int64_t next = int64_t(queries) * pitch;
            float highest = -INFINITY, total = 0;
            for (int n = lane(); n < splits; n += 32) highest = fmaxf(highest, fresh(from + n * next));
            highest = max_of_warp(highest);
            auto weight = [&](float score) { return score > -INFINITY ? expf(score - highest) : 0.f; };
            for (int n = lane(); n < splits; n += 32)
                total = fmaf(weight(fresh(from + n * next)), fresh(from + n * next + 1), total);
            total = sum_of_warp(total);
            float* out = s.y + (slot * pass.queries + query) * s.y_stride + query_head * D;
            for (int c = lane(); c < D; c += 32) {
                float sum = 0;
#pragma unroll 4
                for (int n = 0; n < splits; ++n)
                    sum = fmaf(weight(fresh(from + n * next)), fresh(from + n * next + 2 + c), sum);
                out[c] = total > 0 ? sum / total : 0.f;
            }
        }
        sync_warp();
    }
}

// Per row: the draft if it stands, the next token, stops and statistics; lengths alone roll back the rest.
__device__ __forceinline__ void accept(const Model& m, const Pass& pass, const Shared& shared) {
    if (block_index()) return;
    const Control control = *m.control;
    for (int i = thread_index(); i < shared.slots.count; i += thread_count()) {
        const int row = shared.slots.row[i], position = shared.slots.position[i], r = i * pass.queries;
        const bool drafted = pass.queries == 2;
        // A draft for which the cache has no place was not judged.
        const bool accepted = drafted && position + 1 < m.capacity && fresh(m.above + r) < control.k;
        const int first = accepted ? draft_of(m, row) : id_of(fresh(m.best + r));
        const int second = accepted ? id_of(fresh(m.best + r + 1)) : 0;
        if (drafted) m.draft_best[row] = 0;
        int count = min(accepted ? 2 : 1, max(control.max_length - position - 1, 0));
        if (count && first == control.eos) count = 1;
        const bool ended = (count && first == control.eos) || (count == 2 && second == control.eos);
        int32_t* ids = m.ids + int64_t(row) * m.id_capacity + position + 1;
        if (count) ids[0] = first;
        if (count == 2) ids[1] = second;
        m.stats[3 * row] += 1;
        m.stats[3 * row + 1] += drafted;
        m.stats[3 * row + 2] += accepted ? min(1, count) : 0;
        int32_t* progress = m.progress + int64_t(row) * (1 + m.id_capacity);
        if (count) progress[position + 2] = first;
        if (count == 2) progress[position + 3] = second;
        fence_host();  // before their number, which the host watches
        *static_cast<volatile int32_t*>(progress) = position + 1 + count;
        m.lengths[row] = position + count;
        m.finished[row] = ended || position + 1 + count >= control.max_length;
    }
}

// The weights that a stage will read go to the L2 cache, each warp seeing to its share.
__device__ __forceinline__ void prefetch_weights(const Stage& s) {
    constexpr int64_t kMost = int64_t(8) << 20;  // of an output embedding, which is larger than the cache
    if (!s.weight) return;
    const int64_t bytes = min(int64_t(s.outputs) * s.pitch, kMost);
    const int64_t share = (bytes / 16 + grid_warps() - 1) / grid_warps() * 16;
    const int64_t from = grid_warp() * share;
    prefetch(s.weight + from, min(share, bytes - from), lane());
}

// So do the encoder's keys and values.
__device__ __forceinline__ void prefetch_cross(const Model& m, const Stage& s, const Slots& slots) {
    constexpr int64_t kPiece = 4096;
    if (!s.cross) return;
    const int64_t position = int64_t(m.head_dim) * (s.dtype == Dtype::fp32 ? 4 : 2);
    const int pieces = int((s.capacity * position + kPiece - 1) / kPiece);
    for (int i = grid_warp(); i < 2 * slots.count * m.heads * pieces; i += grid_warps()) {
        const int plane = i / pieces, head = plane % m.heads, slot = plane / m.heads % slots.count;
        const int64_t row = int64_t(plane / m.heads / slots.count) * m.batch + slots.row[slot];
        const int64_t from = i % pieces * kPiece, bytes = m.cross_lengths[slots.row[slot]] * position - from;
        prefetch(s.kv + (row * m.heads + head) * s.capacity * position + from, min(bytes, kPiece), lane());
    }
}

template <Kind kind>
__device__ __forceinline__ void run_stage(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                          float* x) {
    if constexpr (kind == Kind::embed) embed(m, s, pass, shared);
    if constexpr (kind == Kind::accept) accept(m, pass, shared);
    if constexpr (kind == Kind::attend)
        with_float(s.dtype, [&](auto type) { attend<decltype(type)>(m, s, pass, shared); });
    const bool few = shared.slots.count * pass.queries <= 2;  // one row's step, with or without a draft
    if constexpr (kind == Kind::linear)
        with_weight(s.dtype, [&](auto type) {
            few ? linear<decltype(type), 2>(m, s, pass, shared, x)
                : linear<decltype(type), kTile>(m, s, pass, shared, x);
        });
    if constexpr (kind == Kind::verify)
        with_weight(s.dtype, [&](auto type) {
            few ? verify<decltype(type), 2>(m, s, pass, shared, x)
                : verify<decltype(type), kTile>(m, s, pass, shared, x);
        });
}

}  // namespace kvspn::cuda
