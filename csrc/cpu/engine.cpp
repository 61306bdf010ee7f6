#include "cpu/engine.h"

#include <algorithm>
#include <cmath>

#include "common/batch.h"
#include "common/cores.h"
#include "common/counter.h"
#include "common/error.h"
#include "cpu/parts.h"

namespace kvspn {
namespace {

constexpr float kEps = 1e-5f;  // of every LayerNorm
constexpr int kStrip = 64;     // logits that exist at a time, on each thread

int thread_count(int threads) {
    require(threads >= 0 && threads <= 1024, "threads must be 0 to 1024, got ", threads);
    return threads ? threads : usable_cores();
}

}  // namespace

const char* instruction_set() { return select_kernels().name; }

Engine::Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count)
    : weights_(params, weights, count), team_(thread_count(params.threads)), kernels_(select_kernels()) {
    int wide = 3 * weights_.width, hidden = 0, attended = weights_.width;
    for (const Layer& layer : weights_.layers) hidden = std::max(hidden, layer.fc1.outputs);
    for (const Block& block : weights_.blocks) {
        hidden = std::max(hidden, block.fc1.outputs);
        for (const Matrix* q : {&block.kv_q, &block.cross_q}) {
            wide = std::max(wide, q->outputs);
            attended = std::max(attended, q->outputs);
        }
    }
    width_stride_ = pad(weights_.width);
    wide_stride_ = pad(std::max({wide, hidden, attended}));
}

void Engine::set_stream(void* stream) {
    require(!stream, "stream must be a null pointer on the CPU, got one");
}

void Engine::bind(const kvspn_batch& b) {
    const auto [rows, capacity, cross, tokens] = check_batch(b, weights_);
    const int64_t queries = std::max<int64_t>(kPrefillChunk, 2 * rows);
    const int group = weights_.blocks.empty() ? 1 : int(weights_.layers.size()) / weights_.groups;
    const int64_t positions = std::max(capacity * group, cross) + int64_t(kLanes) * group;
    require(positions < (1 << 30), "kv must have less than 2^30 positions in a group of layers, got ",
            positions);
    const int scores = pad(int(positions));
    const int threads = team_.size();
    require(queries <= kMostElements / (int64_t(threads) * wide_stride_), "kv must have fewer rows beside ",
            wide_stride_, " columns and ", threads, " threads, got ", rows);
    Memory x(queries * width_stride_ * sizeof(float)), wide(queries * wide_stride_ * sizeof(float)),
        attended(queries * wide_stride_ * sizeof(float)), hidden(queries * wide_stride_ * sizeof(float)),
        normed(threads * queries * width_stride_ * sizeof(float)),
        quantised(threads * queries * wide_stride_ * sizeof(int16_t)),
        scales(threads * queries * sizeof(float)), score(size_t(threads) * kQueries * scores * sizeof(float)),
        logits(threads * queries * kStrip * sizeof(float)), best(threads * queries * sizeof(Best)),
        ids(queries * sizeof(int32_t)), drafts(rows * sizeof(int32_t));
    slots_.resize(rows);
    prefilled_.assign(rows, 0);
    x_ = std::move(x), wide_ = std::move(wide), attended_ = std::move(attended), hidden_ = std::move(hidden);
    normed_ = std::move(normed), quantised_ = std::move(quantised), scales_ = std::move(scales);
    scores_ = std::move(score), logits_ = std::move(logits), best_ = std::move(best);
    ids_ = std::move(ids), drafts_ = std::move(drafts);
    scores_stride_ = scores;
    const auto cache = [](const kvspn_tensor& kv, const kvspn_tensor* scale, const kvspn_tensor& lengths) {
        size_t bytes = size_of(Dtype(kv.dtype));
        for (int i = 0; i < kv.ndim; ++i) bytes *= size_t(kv.shape[i]);
        prefer_huge_pages(kv.data, bytes);
        return Cache{static_cast<char*>(kv.data), scale ? static_cast<float*>(scale->data) : nullptr,
                     static_cast<int32_t*>(lengths.data), int(kv.shape[4])};
    };
    batch_ = {Dtype(b.kv.dtype),
              cache(b.kv, b.kv_scale, b.lengths),
              cache(b.cross_kv, b.cross_kv_scale, b.cross_lengths),
              static_cast<int32_t*>(b.tokens.data),
              static_cast<int32_t*>(b.stats.data),
              static_cast<uint8_t*>(b.finished.data),
              int(rows),
              int(tokens)};
}

void Engine::encode(int row, const kvspn_tensor& states) {
    check_row(row);
    check_tensor("states", states, {Dtype::fp32, Dtype::bf16, Dtype::fp16}, {-1, weights_.width});
    const int count = int(states.shape[0]);
    require(count >= 1 && count <= batch_.cross.capacity, "states must hold 1 to ", batch_.cross.capacity,
            " positions, got ", count);
    const int d = weights_.width, heads = weights_.heads, head_dim = weights_.head_dim;
    Memory x(size_t(count) * width_stride_ * sizeof(float)), y(size_t(count) * 2 * d * sizeof(float));
    int at = 0;  // the draft network's positions come first
    for (int first = 0, stride = weights_.encoder_stride; first < std::min(stride, count); ++first) {
        const kvspn_tensor rows = every(stride, first, states);
        read_rows(rows, int(rows.shape[0]), d, x.as<float>() + int64_t(at) * width_stride_, width_stride_);
        at += int(rows.shape[0]);
    }
    for (int e = 0; e < count; ++e)
        for (int c = 0; c < d; ++c)
            require(std::isfinite(x.as<float>()[int64_t(e) * width_stride_ + c]),
                    "states must be finite, got NaN or infinity");
    Memory quantised(size_t(count) * width_stride_ * sizeof(int16_t)), scales(size_t(count) * sizeof(float));
    for (int e = 0; e < count; ++e)
        scales.as<float>()[e] =
            kernels_.quantise(x.as<float>() + int64_t(e) * width_stride_, d, width_stride_,
                              quantised.as<int16_t>() + int64_t(e) * width_stride_);
    const Rows rows{x.as<float>(),           width_stride_, count,
                    quantised.as<int16_t>(), width_stride_, scales.as<float>()};
    for (size_t layer = 0; layer < weights_.layers.size(); ++layer) {
        team_.run([&](int thread) {
            auto [first, last] = share(2 * d, thread, team_.size());
            kernels_.linear(weights_.layers[layer].cross_kv, rows, first, last, y.as<float>(), 2 * d, false);
            team_.barrier();
            for (int n = thread; n < 2 * heads; n += team_.size())  // [E, 2, H, D] -> [2, B, H, E, D]
                for (int e = 0; e < count; ++e)
                    write(batch_.cross, int(layer), n / heads, row, n % heads, e,
                          y.as<float>() + int64_t(e) * 2 * d + n * head_dim);
        });
    }
    batch_.cross.lengths[row] = count;
}

void Engine::prefill(int row, int count) {
    check_row(row);
    const int limit = std::min({batch_.self.capacity, batch_.token_capacity, weights_.positions.count});
    require(count >= 0 && count <= limit, "count must be 0 to ", limit, ", got ", count);
    const int cross = cross_length(row);
    const int32_t* ids = batch_.tokens + int64_t(row) * batch_.token_capacity;
    for (int i = 0; i < count; ++i)
        require(ids[i] >= 0 && ids[i] < weights_.vocabulary, "tokens must be 0 to ", weights_.vocabulary - 1,
                ", got ", ids[i]);
    for (int first = 0; first < count; first += kPrefillChunk) {
        const int queries = std::min(kPrefillChunk, count - first);
        slots_[0] = {row, first, queries, 0, cross};
        slot_count_ = 1, rows_ = queries;
        embed(ids + first);
        team_.run([this](int thread) { base_pass(thread); });
    }
    batch_.self.lengths[row] = prefilled_[row] = count;
}

void Engine::check_bound() const { require(batch_.rows, "a batch must be bound first, got none"); }

void Engine::check_row(int row) const {
    check_bound();
    require(row >= 0 && row < batch_.rows, "row must be 0 to ", batch_.rows - 1, ", got ", row);
}

// The caller owns the lengths: they may hold anything, and are read once a call.
int Engine::cross_length(int row) const {
    const int cross = batch_.cross.lengths[row];
    require(cross >= 0 && cross <= batch_.cross.capacity, "cross_lengths[", row, "] must be 0 to ",
            batch_.cross.capacity, ", got ", cross);
    return cross;
}

void Engine::check_step(const kvspn_step_params& params) const {
    check_bound();
    require(params.k >= 1, "k must be at least 1, got ", params.k);
    require(params.eos >= -1, "eos must be at least -1, got ", params.eos);
    const int limit = std::min({batch_.self.capacity, batch_.token_capacity, weights_.positions.count});
    require(params.max_length >= 1 && params.max_length <= limit, "max_length must be 1 to ", limit, ", got ",
            params.max_length);
    require(!params.draft || !weights_.blocks.empty(), "draft must be 0 without draft blocks, got 1");
}

void Engine::step(const kvspn_step_params& params) {
    check_step(params);
    slot_count_ = 0;
    for (int row = 0; row < batch_.rows; ++row) {
        if (batch_.finished[row]) continue;
        const int position = batch_.self.lengths[row];
        require(position >= 0 && position < params.max_length, "lengths[", row, "] must be 0 to ",
                params.max_length - 1, ", got ", position);
        const int32_t newest = batch_.tokens[int64_t(row) * batch_.token_capacity + position];
        require(newest >= 0 && newest < weights_.vocabulary, "tokens must be 0 to ", weights_.vocabulary - 1,
                ", got ", newest);
        slots_[slot_count_] = {row, position, 1, slot_count_, cross_length(row)};
        ids_.as<int32_t>()[slot_count_++] = newest;
    }
    if (!slot_count_) return;
    rows_ = slot_count_;
    params_ = &params;
    verify_drafts_ = false;
    failed_ = -1;
    embed(ids_.as<int32_t>());
    stamp(0, "embed");
    team_.run([this](int thread) {
        if (params_->draft) {
            propose(thread);
            if (thread == 0) {
                // Two queries a row, the newest token and its draft, unless the cache has no place for the
                // latter.
                for (int i = 0; i < slot_count_; ++i) drafts_.as<int32_t>()[i] = best_.as<Best>()[i].id;
                int first = 0;
                for (int i = 0; i < slot_count_; ++i) {
                    Slot& slot = slots_[i];
                    slot.first = first;
                    slot.queries = slot.position + 1 < batch_.self.capacity ? 2 : 1;
                    int32_t* ids = ids_.as<int32_t>() + first;
                    ids[0] = batch_.tokens[int64_t(slot.row) * batch_.token_capacity + slot.position];
                    if (slot.queries == 2) ids[1] = std::max(drafts_.as<int32_t>()[i], 0);
                    first += slot.queries;
                }
                rows_ = first;
                verify_drafts_ = true;
                embed(ids_.as<int32_t>());
            }
            team_.barrier();
            stamp(thread, "embed");
        }
        base_pass(thread);
        verify(thread, "head", weights_.norm, weights_.head, nullptr);
        if (thread == 0) accept();
        stamp(thread, "accept");
    });
    if (failed_ < 0) return;
    const int row = slots_[failed_].row;
    throw NoToken(row, batch_.self.lengths[row] - 1);
}

int Engine::profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity) {
    Stages noted(stages, capacity);
    stages_ = &noted;
    try {
        step(params);
    } catch (...) {
        stages_ = nullptr;
        throw;
    }
    stages_ = nullptr;
    return noted.count();
}

// What has run since the last stamp is a stage, which reads a matrix; for profile() alone.
void Engine::stamp(int thread, const char* name, const Matrix* matrix) {
    if (!stages_ || thread) return;
    stages_->note(name, matrix ? bytes_of(*matrix) : 0);
}

void Engine::generate(const kvspn_generate_params& params) {
    check_step(params.step);
    require(params.max_steps >= 0, "max_steps must be at least 0, got ", params.max_steps);
    kvspn_step_params first = params.step;
    if (params.first_mask) first.mask = params.first_mask, first.draft = 0;
    for (int n = 0; !params.max_steps || n < params.max_steps; ++n) {
        uint8_t* const end = batch_.finished + batch_.rows;  // of what on_step may have bound
        if (std::find(batch_.finished, end, 0) == end) return;
        step(n ? params.step : first);
        if (params.on_step && params.on_step(params.context)) return;
    }
}

void Engine::rollback(int row, int length) {
    check_row(row);
    const int present = std::min(batch_.self.lengths[row], batch_.self.capacity);
    require(length >= 0 && length <= present, "length must be 0 to ", present, ", got ", length);
    batch_.self.lengths[row] = length;
    batch_.finished[row] = 0;
}

void Engine::reset() {
    check_bound();
    std::fill_n(batch_.self.lengths, batch_.rows, 0);
    std::fill_n(batch_.cross.lengths, batch_.rows, 0);
    std::fill_n(batch_.finished, batch_.rows, 1);
    std::fill_n(batch_.stats, 3 * batch_.rows, 0);
    std::fill(prefilled_.begin(), prefilled_.end(), 0);
}

void Engine::read_statistics(int row, kvspn_statistics& statistics) const {
    if (row == -1)
        check_bound();
    else
        check_row(row);
    statistics = {sizeof statistics, 0, 0, 0, 0};
    for (int r = row == -1 ? 0 : row; r < (row == -1 ? batch_.rows : row + 1); ++r) {
        const int32_t* stats = batch_.stats + 3 * int64_t(r);
        statistics.tokens += std::max<int64_t>(int64_t(batch_.self.lengths[r]) - prefilled_[r], 0);
        statistics.steps += stats[0];
        statistics.drafted += stats[1];
        statistics.accepted += stats[2];
    }
}

int Engine::progress(int row, int32_t* tokens, int capacity) const {
    check_row(row);
    const int last = std::clamp(batch_.self.lengths[row], 0, batch_.token_capacity - 1);
    const int first = prefilled_[row] + 1, count = std::max(last + 1 - first, 0);
    std::copy_n(batch_.tokens + int64_t(row) * batch_.token_capacity + first, std::min(count, capacity),
                tokens);
    return count;
}

// Tokens [rows] -> x: their embeddings and those of their positions.
void Engine::embed(const int32_t* ids) {
    for (int i = 0; i < slot_count_; ++i) {
        for (int q = 0; q < slots_[i].queries; ++q) {
            float* x = x_.as<float>() + int64_t(slots_[i].first + q) * width_stride_;
            std::memset(x, 0, width_stride_ * sizeof(float));
            weights_.tokens.add(ids[slots_[i].first + q], x);
            // A draft past the last position is never emitted.
            weights_.positions.add(std::min(slots_[i].position + q, weights_.positions.count - 1), x);
        }
    }
}

void Engine::base_pass(int thread) {
    float *x = x_.as<float>(), *wide = wide_.as<float>(), *attended = attended_.as<float>(),
          *hidden = hidden_.as<float>();
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
        const Layer& layer = weights_.layers[i];
        linear(thread, "self_qkv", &layer.self_norm, x, layer.self_qkv, wide, false, false);
        attend(thread, "self_attention", batch_.self, int(i), 1, true, weights_.heads);
        linear(thread, "self_out", nullptr, attended, layer.self_out, x, false, true);
        linear(thread, "cross_q", &layer.cross_norm, x, layer.cross_q, wide, false, false);
        attend(thread, "cross_attention", batch_.cross, int(i), 1, false, weights_.heads);
        linear(thread, "cross_out", nullptr, attended, layer.cross_out, x, false, true);
        linear(thread, "fc1", &layer.ffn_norm, x, layer.fc1, hidden, true, false);
        linear(thread, "fc2", nullptr, hidden, layer.fc2, x, false, true);
    }
}

void Engine::propose(int thread) {
    float *x = x_.as<float>(), *wide = wide_.as<float>(), *attended = attended_.as<float>(),
          *hidden = hidden_.as<float>();
    const int blocks = int(weights_.blocks.size()), size = int(weights_.layers.size()) / weights_.groups;
    for (int i = 0; i < blocks; ++i) {
        const Block& block = weights_.blocks[i];
        const int end = (i * weights_.groups / blocks + 1) * size,
                  count = weights_.last_layer_only ? 1 : size;
        linear(thread, "draft.kv_q", &block.kv_norm, x, block.kv_q, wide, false, false);
        attend(thread, "draft.kv_attention", batch_.self, end - count, count, false,
               block.kv_q.outputs / weights_.head_dim);
        linear(thread, "draft.kv_out", nullptr, attended, block.kv_out, x, false, true);
        if (block.cross) {
            linear(thread, "draft.cross_q", &block.cross_norm, x, block.cross_q, wide, false, false);
            attend(thread, "draft.cross_attention", batch_.cross, end - 1, 1, false,
                   block.cross_q.outputs / weights_.head_dim, weights_.encoder_stride);
            linear(thread, "draft.cross_out", nullptr, attended, block.cross_out, x, false, true);
        }
        linear(thread, "draft.fc1", &block.ffn_norm, x, block.fc1, hidden, true, false);
        linear(thread, "draft.fc2", nullptr, hidden, block.fc2, x, false, true);
    }
    verify(thread, "draft.head", weights_.draft_norm, weights_.draft_head, weights_.draft_ids);
}

// [LayerNorm ->] x [-> int16], in a thread's own memory: cheaper than to wait for another's.
Rows Engine::input(int thread, const Norm* norm, const float* x, const Matrix& matrix) {
    const int64_t first = int64_t(thread) * std::max(kPrefillChunk, 2 * batch_.rows);
    Rows rows{x, norm ? width_stride_ : wide_stride_, rows_};
    if (norm) {
        float* normed = normed_.as<float>() + first * width_stride_;
        for (int r = 0; r < rows_; ++r)
            kernels_.layer_norm(x + r * rows.stride, norm->weight, norm->bias, weights_.width, kEps,
                                normed + r * rows.stride);
        rows.x = normed;
    }
    if (is_integer(matrix.dtype)) {
        int16_t* quantised = quantised_.as<int16_t>() + first * wide_stride_;
        float* scales = scales_.as<float>() + first;
        rows.quantised = quantised, rows.quantised_stride = wide_stride_, rows.scales = scales;
        for (int r = 0; r < rows_; ++r)
            scales[r] = kernels_.quantise(rows.x + r * rows.stride, matrix.inputs, matrix.columns,
                                          quantised + int64_t(r) * wide_stride_);
    }
    return rows;
}

// y = [LayerNorm ->] x W^T + b [-> GELU], or y += it: a share of the outputs on each thread, then a barrier.
void Engine::linear(int thread, const char* name, const Norm* norm, const float* x, const Matrix& matrix,
                    float* y, bool gelu, bool accumulate) {
    const int64_t y_stride = accumulate ? width_stride_ : wide_stride_;
    auto [first, last] = share(matrix.outputs, thread, team_.size());
    kernels_.linear(matrix, input(thread, norm, x, matrix), first, last, y, y_stride, accumulate);
    if (gelu)
        for (int r = 0; r < rows_; ++r) kernels_.gelu(y + r * y_stride + first, last - first);
    team_.barrier();
    stamp(thread, name, &matrix);
}

// A head's keys and values of a slot's rows of x go to their positions in a layer's cache.
void Engine::append(const Slot& slot, int layer, int head) {
    for (int q = 0; q < slot.queries; ++q) {
        const float* qkv = wide_.as<float>() + int64_t(slot.first + q) * wide_stride_;
        for (int part = 0; part < 2; ++part)
            write(batch_.self, layer, part, slot.row, head, slot.position + q,
                  qkv + (1 + part) * weights_.width + head * weights_.head_dim);
    }
}

// One head's key (part 0) or value x [D] at one position.
void Engine::write(const Cache& cache, int layer, int part, int row, int head, int position, const float* x) {
    const int64_t at = plane(layer, part, row, head) * cache.capacity + position;
    const int width = weights_.head_dim;
    char* to = cache.values + at * width * int64_t(size_of(batch_.dtype));
    if (cache.scales)
        cache.scales[at] = kernels_.quantise_int8(x, width, reinterpret_cast<int8_t*>(to));
    else
        kernels_.narrow(batch_.dtype, x, width, to);
}

// Queries in `wide_` -> `attended_`; (row, head) pairs are dealt out to the threads, then a barrier. What is
// causal appends its own keys and values first; of the rest: to the first of every `stride` positions.
void Engine::attend(int thread, const char* name, const Cache& cache, int layer, int layers, bool causal,
                    int query_heads, int stride) {
    const int head_dim = weights_.head_dim, shared = query_heads / weights_.heads;
    const int64_t values = plane(0, 1, 0, 0) * cache.capacity;  // positions from keys to values
    const int64_t size = int64_t(head_dim) * int64_t(size_of(batch_.dtype));
    float* scores = scores_.as<float>() + int64_t(thread) * kQueries * scores_stride_;
    for (int task = thread; task < slot_count_ * query_heads; task += team_.size()) {
        const Slot& slot = slots_[task / query_heads];
        const int query_head = task % query_heads,
                  length = &cache == &batch_.cross ? slot.cross : slot.position;
        const int64_t keys = plane(layer, 0, slot.row, query_head / shared) * cache.capacity;
        if (causal) append(slot, layer, query_head);
        for (int first = 0; first < slot.queries; first += kQueries) {
            Attention a;
            a.dtype = batch_.dtype;
            a.keys = cache.values + keys * size;
            a.values = cache.values + (keys + values) * size;
            a.stride = head_dim;
            a.layer_stride = 2 * values * head_dim;
            if (cache.scales) {
                a.key_scales = cache.scales + keys;
                a.value_scales = a.key_scales + values;
                a.scale_layer_stride = 2 * values;
            }
            a.layers = layers;
            a.width = head_dim;
            a.scale = 1 / std::sqrt(float(head_dim));
            a.queries = std::min(kQueries, slot.queries - first);
            a.scores = scores;
            for (int q = 0; q < a.queries; ++q) {
                const int64_t row = int64_t(slot.first + first + q) * wide_stride_ + query_head * head_dim;
                a.lengths[q] = causal ? slot.position + first + q + 1 : (length + stride - 1) / stride;
                a.q[q] = wide_.as<float>() + row;
                a.out[q] = attended_.as<float>() + row;
            }
            kernels_.attend(a);
        }
    }
    team_.barrier();
    if (!stages_ || thread) return;
    int64_t positions = 0;
    for (int i = 0; i < slot_count_; ++i)
        positions += causal ? slots_[i].position + slots_[i].queries
                            : (cache.lengths[slots_[i].row] + stride - 1) / stride;
    const int64_t each = size + (cache.scales ? int64_t(sizeof(float)) : 0);
    stages_->note(name, 2 * layers * weights_.heads * positions * each);
}

// Logits strip by strip -> best_[row]: the argmax and the rank of the draft that the row judges.
void Engine::verify(int thread, const char* name, const Norm& norm, const Matrix& head, const int32_t* ids) {
    const int threads = team_.size(), most = std::max(kPrefillChunk, 2 * batch_.rows);
    float* logits = logits_.as<float>() + int64_t(thread) * most * kStrip;
    Best* best = best_.as<Best>() + int64_t(thread) * most;
    const float* mask = params_->mask;
    const Rows rows = input(thread, &norm, x_.as<float>(), head);
    // The drafts' own logits come first, so that one reading of the head tells argmax and rank.
    for (int i = 0; i < slot_count_; ++i) {
        for (int q = 0; q < slots_[i].queries; ++q) {
            const int r = slots_[i].first + q;
            best[r] = {};
            if (!verify_drafts_ || q + 1 == slots_[i].queries) continue;
            const int draft = drafts_.as<int32_t>()[i];
            if (draft < 0) continue;
            Rows row = rows.from(r);
            row.count = 1;
            Best own;
            kernels_.linear(head, row, draft, draft + 1, logits - draft, 1, false);
            kernels_.judge(logits, mask ? mask + draft : nullptr, draft, 1, own);
            best[r].draft = draft, best[r].draft_value = own.value;
        }
    }
    auto [first, last] = share(head.outputs, thread, threads);
    for (int from = first; from < last; from += kStrip) {
        const int to = std::min(from + kStrip, last);
        kernels_.linear(head, rows, from, to, logits - from, kStrip, false);
        float listed[kStrip];  // of a short list, the tokens' own
        if (mask && ids)
            for (int n = from; n < to; ++n) listed[n - from] = mask[ids[n]];
        const float* masked = !mask ? nullptr : ids ? listed : mask + from;
        for (int r = 0; r < rows_; ++r)
            kernels_.judge(logits + int64_t(r) * kStrip, masked, from, to - from, best[r]);
    }
    team_.barrier();
    if (thread == 0) {
        Best* result = best_.as<Best>();
        for (int r = 0; r < rows_; ++r) {
            for (int t = 1; t < threads; ++t) {
                const Best& other = best_.as<Best>()[int64_t(t) * most + r];
                result[r].above += other.above;
                result[r].nan |= other.nan;
                if (other.value > result[r].value) {
                    result[r].value = other.value;
                    result[r].id = other.id;
                }
            }
            if (result[r].nan) result[r].id = -1;
            if (ids && result[r].id >= 0) result[r].id = ids[result[r].id];
        }
    }
    team_.barrier();
    stamp(thread, name, &head);
}

// Per row: the draft if it stands, the next token, stops and statistics; lengths alone roll back the rest.
// A row without a token, which is -1, ends.
void Engine::accept() {
    for (int i = 0; i < slot_count_; ++i) {
        const Slot& slot = slots_[i];
        const Best* best = best_.as<Best>() + slot.first;
        const bool accepted = slot.queries == 2 && drafts_.as<int32_t>()[i] >= 0 && best[0].id >= 0 &&
                              best[0].above < params_->k;
        int32_t emitted[2] = {best[0].id, 0};
        int count = 1, drafts = 0;
        if (accepted) {
            emitted[0] = drafts_.as<int32_t>()[i];
            emitted[1] = best[1].id;
            count = 2;
            drafts = 1;
        }
        count = std::min(count, std::max(params_->max_length - slot.position - 1, 0));
        bool ended = false;
        for (int n = 0; n < count; ++n) {
            if (emitted[n] >= 0 && emitted[n] != params_->eos) continue;
            if (emitted[n] < 0) failed_ = i;
            count = n + 1;
            ended = true;
        }
        int32_t* tokens = batch_.tokens + int64_t(slot.row) * batch_.token_capacity + slot.position + 1;
        for (int n = 0; n < count; ++n) tokens[n] = emitted[n];
        batch_.self.lengths[slot.row] = slot.position + count;
        batch_.finished[slot.row] = ended || slot.position + 1 + count >= params_->max_length;
        int32_t* stats = batch_.stats + 3 * int64_t(slot.row);
        kvspn::count(stats[0], 1);
        kvspn::count(stats[1], params_->draft ? 1 : 0);
        kvspn::count(stats[2], std::min(drafts, count));
    }
}

// Which [capacity, D] of a cache.
int64_t Engine::plane(int layer, int part, int row, int head) const {
    return ((int64_t(layer) * 2 + part) * batch_.rows + row) * weights_.heads + head;
}

}  // namespace kvspn
