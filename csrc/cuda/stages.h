// The stages of a decoder step. A whole grid runs a stage; what one writes, the next reads after a barrier.
//
// A row's result does not depend on the other rows, the number of blocks or the order of threads: an output
// is the work of one warp, in one order; splits of the cache have one size and are combined in their order.
#pragma once

#include "cuda/attend.h"
#include "cuda/verify.h"

namespace kvspn::cuda {

// The rows of a pass.
struct Slots {
    int32_t count;
    int32_t row[kMaxBatch], position[kMaxBatch], encoded[kMaxBatch];  // encoded: positions of the encoder
    int32_t first[kMaxBatch];  // of the batch's rows: the index of the first token that is chosen
    // Of the batch's rows: not greedy; with timestamps; whose draw is among a part of the tokens.
    bool row_ruled[kMaxBatch], row_timed[kMaxBatch], row_cut[kMaxBatch];
    bool ruled, timed, cut, begins;  // whether a row is, is, is, or may choose its first token in the pass
};

// A block's memory; activations lie behind it.
struct Shared {
    Slots slots;
    Tally tally;
};

// Every block finds the pass's rows itself, which is cheaper than a barrier. A row with an absurd length is
// left alone.
__device__ __forceinline__ void collect(const Model& m, const Pass& pass, Slots& slots) {
    if (pass.row >= 0) {
        if (thread_index() == 0) {
            slots.count = 1, slots.row[0] = pass.row, slots.position[0] = pass.position;
            slots.encoded[0] = m.cross_lengths[pass.row];
        }
    } else {
        for (int b = thread_index(); b < m.batch; b += thread_count()) {
            const int length = fresh(m.lengths + b);
            const bool ready = !fresh(reinterpret_cast<const uint8_t*>(m.finished) + b) && length >= 0 &&
                               length < m.capacity && length < m.id_capacity;
            slots.position[b] = ready ? length : -1;
            slots.encoded[b] = m.cross_lengths[b];
            const RowRule& rule = m.rules[b];
            slots.first[b] = rule.first;
            slots.row_ruled[b] = rule.temperature > 0 || rule.times, slots.row_timed[b] = rule.times;
            slots.row_cut[b] = is_cut(rule);
        }
        sync_block();
        if (thread_index() == 0) {
            int count = 0;
            slots.ruled = slots.timed = slots.cut = slots.begins = false;
            for (int b = 0; b < m.batch; ++b) {
                if (slots.position[b] < 0) continue;
                slots.timed |= slots.row_timed[b], slots.ruled |= slots.row_ruled[b];
                slots.cut |= slots.row_cut[b];
                slots.begins |=
                    slots.first[b] > slots.position[b] && slots.first[b] <= slots.position[b] + kMostQueries;
                slots.row[count] = b, slots.encoded[count] = slots.encoded[b];
                slots.position[count++] = slots.position[b];
            }
            slots.count = count;
        }
    }
    sync_block();
}

// What a row's i-th draft is to be, of the caller's or the draft network's; -1: no token.
__device__ __forceinline__ int take_draft(const Model& m, int batch_row, int i) {
    if (const int32_t* given = m.control->drafts) {
        const int id = given[batch_row * m.control->drafts_b + i];
        return id < m.tokens.count ? id : -1;
    }
    const int id = id_of(fresh(m.draft_best + batch_row));
    return m.draft_ids && id >= 0 ? m.draft_ids[id] : id;
}

// Where it is from the base model's embedding on.
__device__ __forceinline__ int32_t* draft_of(const Model& m, int batch_row, int i) {
    return m.drafts + batch_row * (kMostQueries - 1) + i;
}

// A stage's rows of activations, which the stage before has made.
struct StageRows {
    const Stage& s;
    __device__ __forceinline__ float4 four(int r, int column) const {
        return fresh(reinterpret_cast<const float4*>(s.x + r * s.x_stride + column));
    }
    __device__ __forceinline__ bool normed() const { return s.norm_weight; }
    __device__ __forceinline__ float4 norm_weight(int column) const {
        return *reinterpret_cast<const float4*>(s.norm_weight + column);
    }
    __device__ __forceinline__ float4 norm_bias(int column) const {
        return *reinterpret_cast<const float4*>(s.norm_bias + column);
    }
    __device__ __forceinline__ float eps() const { return 1e-5f; }
};

template <class W, int R>
__device__ __forceinline__ void linear(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                       float* x) {
    const Slots& slots = shared.slots;
    auto start = [](int, int, int) {};
    auto begin = [&](int n, int r) {
        return Added{s.bias ? s.bias[n] : 0.f, s.accumulate ? fresh(s.y + r * s.y_stride + n) : 0.f};
    };
    auto end = [&](int n, int r, float value, const Added& added) {
        if (lane() % (32 / R)) return;
        if (s.bias) value += added.bias;
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
            *y = s.accumulate ? added.residual + value : value;
            if (!s.queries) return;
            const int slot = r / pass.queries, position = slots.position[slot] + r % pass.queries;
            const int64_t at = int64_t(slots.row[slot]) * s.capacity + position;
            if (position < s.capacity) reinterpret_cast<float*>(s.kv)[at * m.width + n] = value;
        }
    };
    project<W, R, true>(s, StageRows{s}, slots.count * pass.queries, x, m.shared_floats, start, begin, end);
}

// What the rows of a pass are chosen by, of the draft network or the base model, and where it goes.
struct StageRules {
    static constexpr bool kListed = false;
    const Model& m;
    const Slots& slots;
    int queries;    // of a row
    bool of_draft;  // network
    __device__ __forceinline__ int token(int n) const { return of_draft && m.draft_ids ? m.draft_ids[n] : n; }
    __device__ __forceinline__ const RowRule& rule(int r) const { return m.rules[slots.row[r / queries]]; }
    // Of the row, that the token would have.
    __device__ __forceinline__ int index(int r) const {
        return slots.position[r / queries] + r % queries + 1;
    }
    __device__ __forceinline__ int query(int r) const { return r % queries; }
    __device__ __forceinline__ int text(int r, int at) const {
        return fresh(m.ids + int64_t(slots.row[r / queries]) * m.id_capacity + at);
    }
    __device__ __forceinline__ int drafted(int r, int i) const {
        return fresh(draft_of(m, slots.row[r / queries], i));
    }
    __device__ __forceinline__ bool ruled() const { return slots.ruled; }
    __device__ __forceinline__ bool scored() const { return !of_draft && m.control->log_probs; }
    __device__ __forceinline__ bool parted() const { return slots.timed || slots.cut || scored(); }
    __device__ __forceinline__ float* kept(int r) const {
        return slots.row_cut[slots.row[r / queries]] ? m.kept + r * m.kept_stride : nullptr;
    }
    __device__ __forceinline__ Part* part(int block, int kind, int r) const {
        return m.parts + (block * kKinds + kind) * m.parts_stride + r;
    }
    __device__ __forceinline__ float* draft_logit(int r) const { return m.draft_logits + r; }
    __device__ __forceinline__ float* score(int r) const { return m.scores + 2 * r; }
    __device__ __forceinline__ int draft(int r) const {
        const int query = r % queries;
        return !of_draft && query + 1 < queries ? drafted(r, query) : -1;
    }
    __device__ __forceinline__ uint64_t* best(int r) const {
        return of_draft ? m.draft_best + slots.row[r] : m.best + r;
    }
    __device__ __forceinline__ int32_t* above(int r) const { return m.above + r; }
};

// The draft network's choice, or the base model's judgement of it.
struct StageJudge : StageRules {
    using Rules = StageRules;
    const float *masks, *first_masks;
    __device__ __forceinline__ explicit StageJudge(const StageRules& rules)
        : StageRules(rules),
          masks(m.control->mask),
          first_masks(slots.begins ? m.control->first_mask : nullptr) {}
    __device__ __forceinline__ float mask(int n, int r) const {
        const float* const from =
            first_masks && index(r) == slots.first[slots.row[r / queries]] ? first_masks : masks;
        return from ? from[token(n)] : 0.f;
    }
};

// x = the embedding of each token + that of its position; drafts are noted, and what the step's choices go
// into is cleared.
__device__ __forceinline__ void embed(const Model& m, const Stage& s, const Pass& pass, Shared& shared) {
    const Slots& slots = shared.slots;
    const int rows = slots.count * pass.queries;
    for (int r = block_index(); r < rows; r += block_count()) {
        const int slot = r / pass.queries, q = r % pass.queries, b = slots.row[slot];
        const int at = slots.position[slot] + q;
        const bool draft = pass.row < 0 && q;
        if (draft && !m.control->drafts)
            settle_rows(StageRules{m, slots, 1, true}, slot, slot + 1, m.blocks, m.draft_outputs,
                        shared.tally.meeting);
        int id = draft ? take_draft(m, b, q - 1) : fresh(m.ids + int64_t(b) * m.id_capacity + at);
        if (draft && thread_index() == 0) *draft_of(m, b, q - 1) = id;
        id = min(max(id, 0), m.tokens.count - 1);
        // A draft past the last position is never emitted.
        const int64_t position = min(at, m.positions.count - 1);
        constexpr int kColumns = 4;  // of a thread, whose loads are under way together
        for (int left = thread_index(); left < m.width; left += kColumns * thread_count()) {
            float token[kColumns], at_position[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const int c = min(left + i * thread_count(), m.width - 1);
                token[i] = element(m.tokens, int64_t(id) * m.width + c);
                at_position[i] = element(m.positions, position * m.width + c);
            }
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const int c = left + i * thread_count();
                if (c < m.width) m.x[r * m.x_stride + c] = token[i] + at_position[i];
            }
        }
        if (!s.draft && thread_index() == 0) m.best[r] = 0, m.above[r] = 0;
    }
}

template <class W, int R>
__device__ __forceinline__ void verify(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                       float* x) {
    verify<W, R, true>(s, StageRows{s}, StageJudge(StageRules{m, shared.slots, pass.queries, s.draft}),
                       shared.slots.count * pass.queries, shared.tally, x, m.shared_floats);
}

// The encoder's positions that a stage attends to.
__device__ __forceinline__ int cross_length(const Model& m, const Stage& s, const Slots& slots, int slot) {
    const int stride = s.draft ? m.encoder_stride : 1;
    return (min(max(slots.encoded[slot], 0), s.capacity) + stride - 1) / stride;
}

// The rows of a pass with their queries and what becomes of them.
struct StagePlace {
    const Model& m;
    const Stage& s;
    const Pass& pass;
    const Slots& slots;
    __device__ __forceinline__ int row(int slot) const { return slots.row[slot]; }
    __device__ __forceinline__ int length(int slot) const {
        return s.cross ? cross_length(m, s, slots, slot) : slots.position[slot];
    }
    static constexpr bool kTail = false;
    __device__ __forceinline__ float4 four(int slot, int query, int head, int column) const {
        const float* from = s.x + (slot * pass.queries + query) * s.x_stride + head * m.head_dim;
        return fresh(reinterpret_cast<const float4*>(from + column));
    }
    __device__ __forceinline__ void store(int slot, int query, int head, int column, float value) const {
        s.y[(slot * pass.queries + query) * s.y_stride + head * m.head_dim + column] = value;
    }
    // Keys and values that the pass has made, behind its queries. No other warp reads these positions now.
    __device__ __forceinline__ void append(int slot, int head, int first, int last) const {
        if (!s.causal) return;
        const int position = slots.position[slot], end = min(last, position + pass.queries);
        const int column = lane() % s.lanes * 16;
        for (int from = max(first, position); from < end; from += 32 / s.lanes) {
            const int t = from + lane() / s.lanes;
            const bool used = t < end && column < m.head_dim;
            const float* made = s.x + (slot * pass.queries + t - position) * s.x_stride + head * m.head_dim;
            float x[2][16] = {};
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                if (!used) continue;
                const float* four = made + (1 + i / 16) * m.width + column + i % 16;
                const float4 v = fresh(reinterpret_cast<const float4*>(four));
                float* to = &x[i / 16][i % 16];
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            }
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                float scale;
                const uint4 values = quantise(x[part], s.lanes, scale);
                if (!used) continue;
                const int64_t plane = (int64_t(part) * m.batch + slots.row[slot]) * m.heads + head;
                const int64_t at = plane * s.capacity + t;
                *reinterpret_cast<uint4*>(s.kv + at * m.head_dim + column) = values;
                if (column == 0) s.kv_scale[at] = scale;
            }
        }
        sync_warp();
    }
};

template <class KV>
__device__ __forceinline__ void attend(const Model& m, const Stage& s, const Pass& pass, Shared& shared) {
    const auto of = [&](const void* keys, int width) {
        const int64_t head = int64_t(s.capacity) * width, row = m.heads * head, part = m.batch * row;
        return KeyValues{keys, 2 * part, part, row, head, width, s.capacity};
    };
    attend<KV, true>(Attention{of(s.kv, m.head_dim),
                               {},
                               of(s.kv_scale, 1),
                               shared.slots.count,
                               pass.queries,
                               m.heads,
                               s.query_heads / m.heads,
                               m.head_dim,
                               s.layers,
                               s.lanes,
                               s.causal,
                               1.f / sqrtf(float(m.head_dim)),
                               m.partial_pitch,
                               m.partials,
                               m.arrived},
                     StagePlace{m, s, pass, shared.slots});
}

// A row of the present step: its queries' choices and the ranks of its drafts. What it emits is shown to the
// host.
struct StageRow {
    const Model& m;
    int row, first, drafts;  // first: of its rows of activations
    __device__ __forceinline__ int draft(int i) const { return fresh(draft_of(m, row, i)); }
    __device__ __forceinline__ int choice(int i) const { return id_of(fresh(m.best + first + i)); }
    __device__ __forceinline__ int rank(int i) const {
        return choice(i) < 0 ? KVSPN_K_INF : fresh(m.above + first + i);
    }
    __device__ __forceinline__ void emit(int i, int64_t at, int token) const {
        m.ids[int64_t(row) * m.id_capacity + at] = token;
        if (float* log_probs = m.control->log_probs) {
            const int r = first + i;
            const bool drafted = i < drafts && draft(i) == token;
            const float logit = drafted ? fresh(m.draft_logits + r) : fresh(m.scores + 2 * r + 1);
            log_probs[int64_t(row) * m.id_capacity + at] = logit - fresh(m.scores + 2 * r);
        }
        m.progress[int64_t(row) * (1 + m.id_capacity) + 1 + at] = token;
    }
};

// Not inlined: the kernel of all stages has no register to spare, and this is the work of a moment.
static __device__ __attribute__((noinline)) void accept(const Model& m, int queries, Shared& shared) {
    if (block_index()) return;
    settle_rows(StageRules{m, shared.slots, queries, false}, 0, shared.slots.count * queries, m.blocks,
                m.tokens.count, shared.tally.meeting);
    const StopRule rule = m.control->rule;
    for (int i = thread_index(); i < shared.slots.count; i += thread_count()) {
        const int row = shared.slots.row[i];
        int length = shared.slots.position[i];
        m.finished[row] = kvspn::accept(StageRow{m, row, i * queries, queries - 1}, queries - 1, rule, length,
                                        m.stats + 3 * row);
        m.draft_best[row] = 0;
        m.lengths[row] = length;
        fence_host();  // The tokens come before their number, which the host watches.
        *static_cast<volatile int32_t*>(m.progress + int64_t(row) * (1 + m.id_capacity)) = length + 1;
    }
}

// Warps take pieces in turn.
__device__ __forceinline__ void prefetch_by_all(const void* from, int64_t bytes) {
    constexpr int64_t kPiece = 2048;
    if (!from) return;
    bytes -= bytes % 16;
    for (int64_t at = grid_warp() * kPiece; at < bytes; at += grid_warps() * kPiece)
        prefetch(static_cast<const char*>(from) + at, min(bytes - at, kPiece), lane());
}

// What a stage will read of the model goes to the L2 cache.
__device__ __forceinline__ void prefetch_weights(const Stage& s) {
    constexpr int64_t kMost = int64_t(8) << 20;  // of an output embedding, which is larger than the cache
    prefetch_by_all(s.weight, min(s.outputs * s.pitch, kMost));
    prefetch_by_all(s.norm_weight, int64_t(4) * s.inputs);
    prefetch_by_all(s.norm_bias, int64_t(4) * s.inputs);
    prefetch_by_all(s.bias, int64_t(4) * s.outputs);
    prefetch_by_all(s.scale, min(int64_t(4) * s.outputs * max(s.groups, 1), kMost));
}

// So do the encoder's keys and values, and their scales.
__device__ __forceinline__ void prefetch_cross(const Model& m, const Stage& s, const Slots& slots) {
    constexpr int64_t kPiece = 4096;
    if (!s.cross) return;
    const int64_t position = int64_t(m.head_dim) * (s.dtype == Dtype::fp32 ? 4 : s.kv_scale ? 1 : 2);
    const int pieces = int((s.capacity * position + kPiece - 1) / kPiece);
    for (int i = grid_warp(); i < 2 * slots.count * m.heads * pieces; i += grid_warps()) {
        const int plane = i / pieces, head = plane % m.heads, slot = plane / m.heads % slots.count;
        const int64_t row = int64_t(plane / m.heads / slots.count) * m.batch + slots.row[slot];
        const int64_t first = (row * m.heads + head) * s.capacity;
        const int64_t length = cross_length(m, s, slots, slot);
        const int64_t from = i % pieces * kPiece, bytes = length * position - from;
        prefetch(s.kv + first * position + from, min(bytes, kPiece), lane());
        if (!s.kv_scale || from) continue;
        const int64_t start = first / 4 * 4, end = (first + length) / 4 * 4;
        prefetch(reinterpret_cast<const char*>(s.kv_scale + start), 4 * (end - start), lane());
    }
}

template <Kind kind>
__device__ __forceinline__ void run_stage(const Model& m, const Stage& s, const Pass& pass, Shared& shared,
                                          float* x) {
    if constexpr (kind == Kind::embed) embed(m, s, pass, shared);
    if constexpr (kind == Kind::accept) accept(m, pass.queries, shared);
    if constexpr (kind == Kind::attend)
        with_kv(s.dtype, [&](auto type) { attend<decltype(type)>(m, s, pass, shared); });
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
