#include "cpu/runner.h"

#include <algorithm>
#include <cmath>

#include "common/accept.h"
#include "common/cores.h"
#include "common/error.h"
#include "cpu/parts.h"

namespace kvspn::cpu {
namespace {

int thread_count(int threads) {
    require(threads >= 0 && threads <= 1024, "threads must be 0 to 1024, got ", threads);
    return threads ? threads : usable_cores();
}

// [positions, 2, D / 2]: cosines, then sines, of position / base^(2 i / D), in the precision that models
// learn them with.
Memory rotary_angles(float base, int head_dim, int positions) {
    const int half = base ? head_dim / 2 : 0;
    Memory made(size_t(positions) * 2 * half * sizeof(float), false);
    for (int i = 0; i < half; ++i) {
        const float speed = 1.0f / std::pow(base, 2.0f * float(i) / float(head_dim));
        for (int position = 0; position < positions; ++position) {
            float* at = made.as<float>() + int64_t(position) * 2 * half + i;
            at[0] = std::cos(float(position) * speed), at[half] = std::sin(float(position) * speed);
        }
    }
    return made;
}

int strips(const Matrix& head) { return (head.outputs + kStrip - 1) / kStrip; }

}  // namespace

CpuRunner::CpuRunner(const kvspn_engine_params& params, const Weights& weights, const Plan& plan)
    : weights_(weights),
      plan_(plan),
      team_(thread_count(params.threads)),
      kernels_(select_kernels(params.variant)) {
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
    kept_stride_ = pad(std::max(weights_.head.outputs, weights_.draft_head.outputs));
}

void CpuRunner::set_stream(void* stream) {
    require(!stream, "stream must be a null pointer on the CPU, got one");
}

void CpuRunner::bind(const Batch& batch) {
    const Architecture& a = weights_.architecture;
    const int group = a.blocks ? a.layers / a.groups : 1;
    const int64_t positions = std::max<int64_t>(int64_t(batch.self.capacity) * group, batch.cross.capacity) +
                              int64_t(kLanes) * group;
    require(positions < (1 << 30), "kv must have less than 2^30 positions in a group of layers, got ",
            positions);
    const int scores = pad(int(positions));
    Memory score(size_t(team_.size()) * kQueries * size_t(scores) * sizeof(float));
    Memory rotary = rotary_angles(a.rotary_base, weights_.head_dim, batch.self.capacity);
    std::vector<Slot> slots(size_t(batch.rows));
    std::vector<RowRule> rules(size_t(batch.rows));
    reserve(2 * int64_t(batch.rows));
    scores_ = std::move(score), scores_stride_ = scores, rotary_ = std::move(rotary);
    slots_ = std::move(slots), rules_ = std::move(rules);
    for (const Cache* cache : {&batch.self, &batch.cross})
        prefer_huge_pages(cache->values, batch.bytes_of(*cache));
    batch_ = batch;
}

// Memory for passes of so many rows of activations.
void CpuRunner::reserve(int64_t rows) {
    rows = std::max<int64_t>(rows, kPrefillChunk);
    if (rows <= reserved_) return;
    const int threads = team_.size();
    require(rows <= kMostElements / (int64_t(threads) * wide_stride_), "kv must have fewer rows beside ",
            wide_stride_, " columns and ", threads, " threads, got passes of ", rows);
    const size_t each = size_t(rows), all = size_t(threads) * each;
    const size_t all_strips = size_t(std::max(strips(weights_.head), strips(weights_.draft_head)));
    Memory x(each * width_stride_ * sizeof(float)), wide(each * wide_stride_ * sizeof(float)),
        attended(each * wide_stride_ * sizeof(float)), hidden(each * wide_stride_ * sizeof(float)),
        normed(all * width_stride_ * sizeof(float)), quantised(all * wide_stride_ * sizeof(int16_t)),
        scales(all * sizeof(float)), logits(all * kStrip * sizeof(float)), best(all * kKinds * sizeof(Best)),
        ids(each * sizeof(int32_t)), parts(each * kKinds * all_strips * sizeof(Partition)),
        windows(each * sizeof(Window));
    x_ = std::move(x), wide_ = std::move(wide), attended_ = std::move(attended), hidden_ = std::move(hidden);
    normed_ = std::move(normed), quantised_ = std::move(quantised), scales_ = std::move(scales);
    logits_ = std::move(logits), best_ = std::move(best), ids_ = std::move(ids);
    parts_ = std::move(parts), windows_ = std::move(windows);
    reserved_ = int(rows);
}

// Memory for the logits of rows that are cut, once there are such rows.
void CpuRunner::reserve_draws() {
    int most = 0;
    for (const RowRule& rule : rules_)
        if (is_cut(rule)) most = std::max(most, std::min(rule.top_k, kept_stride_));
    if (!most) return;
    const size_t kept = size_t(reserved_) * size_t(kept_stride_) * sizeof(float);
    if (kept_.bytes() < kept) kept_ = Memory(kept);
    if (ranked_stride_ >= most) return;
    ranked_ = Memory(size_t(team_.size()) * size_t(most) * sizeof(Ranked));
    ranked_stride_ = most;
}

void CpuRunner::encode(int row, const kvspn_tensor& states) {
    const int count = int(states.shape[0]);
    const int d = weights_.width, heads = weights_.architecture.heads, head_dim = weights_.head_dim;
    Memory x(size_t(count) * width_stride_ * sizeof(float)), y(size_t(count) * 2 * d * sizeof(float));
    int at = 0;  // the draft network's positions come first
    for (int first = 0, stride = weights_.architecture.encoder_stride; first < std::min(stride, count);
         ++first) {
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
    for (const Stage& stage : plan_.encode) {
        team_.run([&](int thread) {
            auto [first, last] = share(2 * d, thread, team_.size());
            kernels_.linear(*stage.matrix, rows, first, last, y.as<float>(), 2 * d, false);
            team_.barrier();
            for (int n = thread; n < 2 * heads; n += team_.size())  // [E, 2, H, D] -> [2, B, H, E, D]
                for (int e = 0; e < count; ++e)
                    write_position(batch_.cross, stage.layer, n / heads, row, n % heads, e,
                                   y.as<float>() + int64_t(e) * 2 * d + n * head_dim);
        });
    }
}

void CpuRunner::prefill(int row, int first, int count, int position, float* logits) {
    const int cross = cross_length(row);
    const int32_t* ids = batch_.tokens + int64_t(row) * batch_.token_capacity;
    for (int i = first; i < count; ++i)
        require(ids[i] >= 0 && ids[i] < weights_.vocabulary, "tokens must be 0 to ", weights_.vocabulary - 1,
                ", got ", ids[i]);
    for (; first < count; first += kPrefillChunk) {
        const int queries = std::min(kPrefillChunk, count - first);
        slots_[0] = {row, first, queries, 0, cross, 0};
        slot_count_ = 1, rows_ = queries;
        std::copy_n(ids + first, queries, ids_.as<int32_t>());
        team_.run([this](int thread) { walk(thread, plan_.base, plan_.judge); });
        if (logits && position >= first && position < first + queries) tell(position - first, logits);
    }
}

// The logits that row r of x gives.
void CpuRunner::tell(int r, float* logits) {
    const Matrix& head = weights_.head;
    rows_ = 1;
    team_.run([&](int thread) {
        auto [first, last] = share(head.outputs, thread, team_.size(), kStrip);
        const Rows row = input(thread, &weights_.norm, x_.as<float>() + int64_t(r) * width_stride_, head);
        kernels_.linear(head, row, first, last, logits, head.outputs, false);
    });
}

// The caller owns the lengths: they may hold anything, and are read once a call.
int CpuRunner::cross_length(int row) const {
    const int cross = batch_.cross.lengths[row];
    require(cross >= 0 && cross <= batch_.cross.capacity, "cross_lengths[", row, "] must be 0 to ",
            batch_.cross.capacity, ", got ", cross);
    return cross;
}

// A slot for every unfinished row: its newest token and, where the caller gives them, its drafts. False where
// there is no such row.
bool CpuRunner::find_slots() {
    const kvspn_tensor* given = params_->draft_tokens;
    int32_t* ids = ids_.as<int32_t>();
    slot_count_ = rows_ = 0;
    for (int row = 0; row < batch_.rows; ++row) {
        if (batch_.finished[row]) continue;
        const int position = batch_.self.lengths[row];
        require(position >= 0 && position < params_->max_length, "lengths[", row, "] must be 0 to ",
                params_->max_length - 1, ", got ", position);
        const int32_t newest = batch_.tokens[int64_t(row) * batch_.token_capacity + position];
        require(newest >= 0 && newest < weights_.vocabulary, "tokens must be 0 to ", weights_.vocabulary - 1,
                ", got ", newest);
        Slot slot{row, position, 1, rows_, cross_length(row), 0};
        ids[rows_++] = newest;
        for (; slot.drafts < drafts_of(*params_) && given; ++slot.drafts) {
            const int32_t id = static_cast<const int32_t*>(
                given->data)[row * given->strides[0] + slot.drafts * given->strides[1]];
            if (id < 0 || id >= weights_.vocabulary) break;
            if (position + slot.queries == batch_.self.capacity) continue;  // no place for it
            ids[rows_++] = id, ++slot.queries;
        }
        slots_[size_t(slot_count_++)] = slot;
    }
    return slot_count_;
}

void CpuRunner::run(const kvspn_step_params& params, int steps) {
    params_ = &params;
    reserve(int64_t(batch_.rows) * (1 + drafts_of(params)));
    reserve_draws();
    const int first = params.draft ? 0 : plan_.base, last = int(plan_.stages.size());
    for (; steps-- && find_slots();)
        team_.run([this, first, last](int thread) { walk(thread, first, last); });
}

std::vector<Timing> CpuRunner::profile(const kvspn_step_params& params) {
    std::vector<Timing> timings;
    timings.reserve(plan_.stages.size());
    timings_ = &timings;
    try {
        last_ = std::chrono::steady_clock::now();
        run(params, 1);
    } catch (...) {
        timings_ = nullptr;
        throw;
    }
    timings_ = nullptr;
    return timings;
}

// Each stage on this thread's share of the work, with a barrier behind it.
void CpuRunner::walk(int thread, int first, int last) {
    for (int i = first; i < last; ++i) {
        const Stage& stage = plan_.stages[size_t(i)];
        switch (stage.kind) {
            case Kind::embed:
                if (thread == 0) {
                    if (!stage.draft && first < plan_.base) take_drafts();
                    embed();
                    open_windows();
                }
                break;
            case Kind::linear:
                linear(thread, stage);
                break;
            case Kind::attend:
                attend(thread, stage);
                break;
            case Kind::verify:
                verify(thread, stage);
                break;
            case Kind::accept:
                if (thread == 0) accept();
        }
        team_.barrier();
        if (!timings_ || thread) continue;
        const auto now = std::chrono::steady_clock::now();
        timings_->push_back({std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count(), -1});
        last_ = now;
    }
}

// The draft network's choices become second queries of their rows, where the cache has a place for them.
void CpuRunner::take_drafts() {
    int32_t* ids = ids_.as<int32_t>();
    rows_ = 0;
    for (int i = 0; i < slot_count_; ++i) {
        Slot& slot = slots_[size_t(i)];
        const int32_t draft = best_.as<Best>()[kKinds * i].id;
        slot.first = rows_, slot.drafts = draft >= 0;
        ids[rows_++] = batch_.tokens[int64_t(slot.row) * batch_.token_capacity + slot.position];
        if (draft < 0 || slot.position + 1 == batch_.self.capacity) continue;
        ids[rows_++] = draft, slot.queries = 2;
    }
}

Shown CpuRunner::shown(int row) const {
    const int last = std::clamp(batch_.self.lengths[row], 0, batch_.token_capacity - 1);
    return {last + 1, batch_.tokens + int64_t(row) * batch_.token_capacity};
}

void CpuRunner::write(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void CpuRunner::read(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }

float* CpuRunner::place(Place place) const {
    const Memory& memory = place == Place::residual   ? x_
                           : place == Place::wide     ? wide_
                           : place == Place::attended ? attended_
                                                      : hidden_;
    return memory.as<float>();
}

int64_t CpuRunner::stride(Place place) const {
    return place == Place::residual ? width_stride_ : wide_stride_;
}

// The tokens of all rows -> x: their embeddings and those of their positions.
void CpuRunner::embed() {
    const int32_t* ids = ids_.as<int32_t>();
    for (int i = 0; i < slot_count_; ++i) {
        for (int q = 0; q < slots_[i].queries; ++q) {
            float* x = x_.as<float>() + int64_t(slots_[i].first + q) * width_stride_;
            std::memset(x, 0, width_stride_ * sizeof(float));
            weights_.tokens.add(ids[slots_[i].first + q], x);
            if (weights_.architecture.rotary_base) continue;
            // A draft past the last position is never emitted.
            weights_.positions.add(std::min(slots_[i].position + q, weights_.positions.count - 1), x);
        }
    }
}

// [norm ->] x [-> int16], in a thread's own memory: cheaper than to wait for another's.
Rows CpuRunner::input(int thread, const Norm* norm, const float* x, const Matrix& matrix) {
    const int64_t first = int64_t(thread) * reserved_;
    Rows rows{x, norm ? width_stride_ : wide_stride_, rows_};
    if (norm) {
        float* normed = normed_.as<float>() + first * width_stride_;
        const float eps = weights_.architecture.norm_eps;
        for (int r = 0; r < rows_; ++r) {
            const int64_t at = r * rows.stride;
            if (norm->bias)
                kernels_.layer_norm(x + at, norm->weight, norm->bias, weights_.width, eps, normed + at);
            else
                kernels_.rms_norm(x + at, norm->weight, weights_.width, eps, normed + at);
        }
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

// to = [norm ->] from W^T + b [-> activation], or to += it: this thread's share of the outputs.
void CpuRunner::linear(int thread, const Stage& stage) {
    const Matrix& matrix = *stage.matrix;
    float* y = place(stage.to);
    const int64_t y_stride = stride(stage.to);
    const bool gated = stage.activation == Activation::swiglu;
    const int outputs = gated ? matrix.outputs / 2 : matrix.outputs;
    auto [first, last] = share(outputs, thread, team_.size());
    const Rows rows = input(thread, stage.norm, place(stage.from), matrix);
    kernels_.linear(matrix, rows, first, last, y, y_stride, stage.accumulate);
    if (stage.activation == Activation::gelu)
        for (int r = 0; r < rows_; ++r) kernels_.gelu(y + r * y_stride + first, last - first);
    if (gated) {
        float* gated_by = place(Place::wide);  // free here
        kernels_.linear(matrix, rows, outputs + first, outputs + last, gated_by - outputs, wide_stride_,
                        false);
        for (int r = 0; r < rows_; ++r)
            kernels_.swiglu(y + r * y_stride + first, gated_by + r * wide_stride_ + first, last - first);
    }
    if (stage.queries && batch_.queries) keep_queries(stage.layer, first, last);
}

// Columns of the queries of all slots, for the batch.
void CpuRunner::keep_queries(int layer, int first, int last) {
    for (int i = 0; i < slot_count_; ++i)
        for (int q = 0; q < slots_[i].queries; ++q) {
            const float* from = wide_.as<float>() + int64_t(slots_[i].first + q) * wide_stride_;
            std::copy(from + first, from + last,
                      batch_.queries_of(layer, slots_[i].row, slots_[i].position + q) + first);
        }
}

// Heads in `wide_`, a slot's rows of them, are turned by the angles of their positions (Su et al. 2021): the
// first half of a head's numbers with the second.
void CpuRunner::rotate(const Slot& slot, int first_head, int heads) const {
    const int half = weights_.head_dim / 2;
    for (int q = 0; q < slot.queries; ++q) {
        const float* cosines = rotary_.as<float>() + int64_t(slot.position + q) * 2 * half;
        const float* sines = cosines + half;
        float* x = wide_.as<float>() + int64_t(slot.first + q) * wide_stride_ + first_head * 2 * half;
        for (int head = 0; head < heads; ++head, x += 2 * half)
            for (int i = 0; i < half; ++i) {
                const float a = x[i], b = x[half + i];
                x[i] = a * cosines[i] - b * sines[i];
                x[half + i] = b * cosines[i] + a * sines[i];
            }
    }
}

// A head's keys and values of a slot's rows of x go to their positions in a layer's cache.
void CpuRunner::append(const Slot& slot, int layer, int head) {
    for (int q = 0; q < slot.queries; ++q) {
        const float* qkv = wide_.as<float>() + int64_t(slot.first + q) * wide_stride_;
        for (int part = 0; part < 2; ++part)
            write_position(
                batch_.self, layer, part, slot.row, head, slot.position + q,
                qkv + weights_.width + (part * weights_.architecture.key_heads + head) * weights_.head_dim);
    }
}

// One head's key (part 0) or value x [D] at one position.
void CpuRunner::write_position(const Cache& cache, int layer, int part, int row, int head, int position,
                               const float* x) {
    const int64_t at = batch_.plane(layer, part, row, head) * cache.capacity + position;
    const int width = weights_.head_dim;
    char* to = cache.values + at * width * int64_t(size_of(batch_.dtype));
    if (cache.scales)
        cache.scales[at] = kernels_.quantise_int8(x, width, reinterpret_cast<int8_t*>(to));
    else
        kernels_.narrow(batch_.dtype, x, width, to);
}

// Queries in `wide_` -> `attended_`: this thread's pairs of a row and a head of keys, with all the queries
// that share it. What is causal appends its own keys and values first; the draft network attends to every
// n-th position of the encoder, which lie in front.
void CpuRunner::attend(int thread, const Stage& stage) {
    const Architecture& architecture = weights_.architecture;
    const Cache& cache = stage.cross ? batch_.cross : batch_.self;
    const int stride = stage.cross && stage.draft ? architecture.encoder_stride : 1;
    const int head_dim = weights_.head_dim, heads = architecture.key_heads,
              shared = stage.query_heads / heads;
    const int64_t values = batch_.plane(0, 1, 0, 0) * cache.capacity;  // positions from keys to values
    const int64_t size = int64_t(head_dim) * int64_t(size_of(batch_.dtype));
    float* scores = scores_.as<float>() + int64_t(thread) * kQueries * scores_stride_;
    for (int task = thread; task < slot_count_ * heads; task += team_.size()) {
        const Slot& slot = slots_[task / heads];
        const int head = task % heads, length = stage.cross ? slot.cross : slot.position;
        const int64_t keys = batch_.plane(stage.layer, 0, slot.row, head) * cache.capacity;
        if (architecture.rotary_base && !stage.cross) {
            rotate(slot, head * shared, shared);
            if (stage.causal) rotate(slot, stage.query_heads + head, 1);
        }
        if (stage.causal) append(slot, stage.layer, head);
        const int queries = slot.queries * shared;
        for (int first = 0; first < queries; first += kQueries) {
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
            a.layers = stage.layers;
            a.width = head_dim;
            a.scale = 1 / std::sqrt(float(head_dim));
            a.queries = std::min(kQueries, queries - first);
            a.scores = scores;
            for (int i = 0; i < a.queries; ++i) {
                const int q = (first + i) / shared, query_head = head * shared + (first + i) % shared;
                const int64_t row = int64_t(slot.first + q) * wide_stride_ + query_head * head_dim;
                a.lengths[i] = stage.causal ? slot.position + q + 1 : (length + stride - 1) / stride;
                a.q[i] = wide_.as<float>() + row;
                a.out[i] = attended_.as<float>() + row;
            }
            kernels_.attend(a);
        }
    }
}

// The tokens that may come behind each row of x, where its rule has timestamps.
void CpuRunner::open_windows() {
    for (int i = 0; i < slot_count_; ++i) {
        const Slot& slot = slots_[size_t(i)];
        const RowRule& rule = rules_[size_t(slot.row)];
        if (!rule.times) continue;
        const int32_t* tokens = batch_.tokens + int64_t(slot.row) * batch_.token_capacity;
        History history;
        for (int at = std::max(rule.first - rule.prefix, 0); at <= slot.position; ++at)
            push(history, tokens[at], rule);
        for (int q = 0; q < slot.queries; ++q) {
            if (q) push(history, ids_.as<int32_t>()[slot.first + q], rule);
            windows_.as<Window>()[slot.first + q] = window_of(rule, history);
        }
    }
}

// What the logits of a slot's query are held against.
Judge CpuRunner::judge(const Stage& stage, const Slot& slot, int query) const {
    const RowRule& rule = rules_[size_t(slot.row)];
    const int index = slot.position + query + 1;
    const bool first = params_->first_mask && index == rule.first;
    return {kernels_,
            first ? params_->first_mask : params_->mask,
            stage.draft ? weights_.draft_ids : nullptr,
            &rule,
            index,
            windows_.as<Window>()[slot.first + query],
            stage.matrix->outputs};
}

// Logits strip by strip -> best_[kKinds * row]: the argmax and the rank of the draft that the row judges.
void CpuRunner::verify(int thread, const Stage& stage) {
    const Matrix& head = *stage.matrix;
    const int threads = team_.size(), most = reserved_;
    const bool scored = params_->log_probs && !stage.draft;
    float* logits = logits_.as<float>() + int64_t(thread) * most * kStrip;
    const auto best = [&](int of, int r) { return best_.as<Best>() + (int64_t(of) * most + r) * kKinds; };
    const auto parts = [&](int r) { return parts_.as<Partition>() + int64_t(r) * kKinds * strips(head); };
    const auto draft_of = [&](int r) { return ids_.as<int32_t>()[r + 1]; };
    const auto kept = [&](int r) { return kept_.as<float>() + int64_t(r) * kept_stride_; };
    const auto each_row = [&](auto visit) {
        for (int i = 0; i < slot_count_; ++i)
            for (int q = 0; q < slots_[i].queries; ++q)
                visit(slots_[i].first + q, judge(stage, slots_[i], q), q + 1 < slots_[i].queries);
    };
    const Rows rows = input(thread, stage.norm, x_.as<float>(), head);
    bool cut = false;  // some row is
    each_row([&](int r, const Judge& judge, bool judges) {
        std::fill_n(best(thread, r), kKinds, Best{});
        cut |= is_cut(*judge.rule);
        if (!judges || is_cut(*judge.rule)) return;
        const int draft = draft_of(r);
        Rows row = rows.from(r);
        row.count = 1;
        kernels_.linear(head, row, draft, draft + 1, logits - draft, 1, false);
        judge.expect(draft, *logits, best(thread, r));
    });
    auto [first, last] = share(head.outputs, thread, threads, kStrip);
    for (int from = first; from < last; from += kStrip) {
        const int to = std::min(from + kStrip, last);
        kernels_.linear(head, rows, from, to, logits - from, kStrip, false);
        each_row([&](int r, const Judge& judge, bool) {
            if (is_cut(*judge.rule)) {
                std::copy_n(logits + int64_t(r) * kStrip, to - from, kept(r) + from);
                return;
            }
            const bool parted = scored || judge.rule->times;
            judge.hear(logits + int64_t(r) * kStrip, from, to - from, best(thread, r),
                       parted ? parts(r) + from / kStrip : nullptr);
        });
    }
    if (cut) {
        team_.barrier();
        each_row([&](int r, Judge judge, bool judges) {
            if (!is_cut(*judge.rule) || r % threads != thread) return;
            judge.rank(kept(r), parts(r), std::min(judge.rule->top_k, head.outputs),
                       ranked_.as<Ranked>() + int64_t(thread) * ranked_stride_);
            if (judges) judge.expect(draft_of(r), kept(r)[draft_of(r)], best(0, r));
            judge.hear(kept(r), 0, head.outputs, best(0, r),
                       scored || judge.rule->times ? parts(r) : nullptr);
        });
    }
    team_.barrier();
    if (thread) return;
    each_row([&](int r, const Judge& judge, bool) {
        Best* result = best(0, r);
        for (int kind = 0; kind < judge.kinds(); ++kind) {
            for (int t = 1; t < threads; ++t) {
                const Best& other = best(t, r)[kind];
                result[kind].above += other.above;
                result[kind].nan |= other.nan;
                if (other.value > result[kind].value) {
                    result[kind].value = other.value, result[kind].logit = other.logit;
                    result[kind].id = other.id;
                }
            }
        }
        *result = judge.decide(result, parts(r), scored);
        if (judge.ids && result->id >= 0) result->id = judge.ids[result->id];
    });
}

struct CpuRunner::SlotRow {
    const Slot& slot;
    const Best* bests;   // of the row's queries, kKinds each
    const int32_t* ids;  // and their tokens
    int32_t* tokens;     // of the row
    float* log_probs;    // and theirs; or null
    // What the cache has no place for was not verified, and does not stand.
    bool verified(int i) const { return i + 1 < slot.queries; }
    int32_t draft(int i) const { return verified(i) ? ids[i + 1] : 0; }
    const Best& best(int i) const { return bests[kKinds * i]; }
    int32_t rank(int i) const { return verified(i) && best(i).id >= 0 ? best(i).above : KVSPN_K_INF; }
    int32_t choice(int i) const { return best(i).id; }
    void emit(int32_t i, int64_t at, int32_t token) const {
        tokens[at] = token;
        if (log_probs)
            log_probs[at] =
                (best(i).draft == token ? best(i).draft_logit : best(i).logit) - best(i).log_sum_exp;
    }
};

void CpuRunner::accept() {
    const StopRule rule{params_->k, params_->eos, params_->max_length};
    for (int i = 0; i < slot_count_; ++i) {
        const Slot& slot = slots_[size_t(i)];
        const int64_t start = int64_t(slot.row) * batch_.token_capacity;
        const SlotRow row{
            slot, best_.as<Best>() + kKinds * slot.first, ids_.as<int32_t>() + slot.first,
            batch_.tokens + start,
            params_->log_probs ? static_cast<float*>(params_->log_probs->data) + start : nullptr};
        batch_.finished[slot.row] = kvspn::accept(row, slot.drafts, rule, batch_.self.lengths[slot.row],
                                                  batch_.stats + 3 * int64_t(slot.row));
    }
}

}  // namespace kvspn::cpu
