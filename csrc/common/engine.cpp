#include "common/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/error.h"

namespace kvspn {

Engine::Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count)
    : backend_(get_backend(params.device)),
      weights_(params, weights, count, backend_.layout),
      plan_(weights_),
      runner_(backend_.make_runner(params, weights_, plan_)) {}

void Engine::bind(const kvspn_batch& b) {
    const Batch batch = check_batch(b, weights_);
    std::vector<int> prefilled(size_t(batch.rows));
    std::vector<uint8_t> finished(size_t(batch.rows));
    std::vector<RowRule> rules(size_t(batch.rows));
    runner_->bind(batch);
    batch_ = batch, rules_ = std::move(rules);
    prefilled_ = std::move(prefilled), finished_ = std::move(finished);
}

void Engine::encode(int row, const kvspn_tensor& states) {
    check_row(row);
    require(weights_.architecture.cross, "states must not be given with no_cross, got a tensor");
    check_tensor("states", states, {Dtype::fp32, Dtype::bf16, Dtype::fp16}, {-1, weights_.width});
    const int64_t capacity = batch_.cross.capacity, count = states.shape[0];
    require(count >= 1 && count <= capacity, "states must hold 1 to ", capacity, " positions, got ", count);
    runner_->encode(row, states);
    const int32_t length = int32_t(count);
    runner_->write(batch_.cross.lengths + row, &length, sizeof length);
    runner_->wait();
}

void Engine::prefill(int row, int first, int count, int position, const kvspn_tensor* logits) {
    check_row(row);
    require(count >= 0 && count <= length_limit(), "count must be 0 to ", length_limit(), ", got ", count);
    int32_t present = 0;
    if (first) runner_->read(&present, batch_.self.lengths + row, sizeof present);
    present = std::min(present, count);
    require(first >= 0 && first <= present, "first must be 0 to ", present, ", got ", first);
    if (logits) {
        check_tensor("logits", *logits, {Dtype::fp32}, {weights_.vocabulary});
        check_contiguous("logits", *logits);
        require(position >= first && position < count, "position must be ", first, " to ", count - 1,
                ", got ", position);
    }
    runner_->prefill(row, first, count, position, logits ? static_cast<float*>(logits->data) : nullptr);
    const int32_t length = count;
    runner_->write(batch_.self.lengths + row, &length, sizeof length);
    rules_[size_t(row)].first = count + 1;
    write_rule(row);
    prefilled_[size_t(row)] = count;
    runner_->forget(row, 0);
}

void Engine::set_rule(int row, const kvspn_rule& rule) {
    check_row(row);
    require(std::isfinite(rule.temperature) && rule.temperature >= 0,
            "temperature must be 0 or a positive number, got ", rule.temperature);
    RowRule own = rules_[size_t(row)];
    own.temperature = rule.temperature;
    require(rule.top_k >= 0 && (!rule.top_k || rule.temperature > 0),
            "top_k must be 0, or at a temperature a positive number, got ", rule.top_k);
    own.top_k = rule.top_k;
    own.seed[0] = uint32_t(rule.seed), own.seed[1] = uint32_t(rule.seed >> 32);
    own.times = own.text_end = own.last_first = own.prefix = 0;
    if (rule.timestamp_begin) {
        require(rule.timestamp_begin > 0 && rule.timestamp_begin < weights_.vocabulary,
                "timestamp_begin must be 0 for none, or 1 to ", weights_.vocabulary - 1, ", got ",
                rule.timestamp_begin);
        require(rule.text_end >= 0 && rule.text_end <= rule.timestamp_begin, "text_end must be 0 to ",
                rule.timestamp_begin, ", got ", rule.text_end);
        require(rule.max_initial >= -1, "max_initial must be at least -1, got ", rule.max_initial);
        require(rule.prefix >= 0, "prefix must be at least 0, got ", rule.prefix);
        own.times = rule.timestamp_begin, own.text_end = rule.text_end, own.prefix = rule.prefix;
        own.last_first = rule.max_initial < 0
                             ? kLastToken
                             : int32_t(std::min<int64_t>(int64_t(own.times) + rule.max_initial, kLastToken));
    }
    if (!std::memcmp(&own, &rules_[size_t(row)], sizeof own)) return;  // A device need not wait for it.
    rules_[size_t(row)] = own;
    write_rule(row);
}

void Engine::write_rule(int row) {
    runner_->set_rule(row, rules_[size_t(row)]);
    runner_->wait();
}

void Engine::check_bound() const { require(batch_.rows, "a batch must be bound first, got none"); }

void Engine::check_row(int row) const {
    check_bound();
    require(row >= 0 && row < batch_.rows, "row must be 0 to ", batch_.rows - 1, ", got ", row);
}

// Tokens of a row at most.
int Engine::length_limit() const {
    const int most = std::min(batch_.self.capacity, batch_.token_capacity);
    return weights_.architecture.rotary_base ? most : std::min(most, weights_.positions.count);
}

void Engine::check_step(const kvspn_step_params& params) const {
    check_bound();
    require(params.k >= 1, "k must be at least 1, got ", params.k);
    require(params.eos >= -1, "eos must be at least -1, got ", params.eos);
    require(params.max_length >= 1 && params.max_length <= length_limit(), "max_length must be 1 to ",
            length_limit(), ", got ", params.max_length);
    require(!params.draft || !weights_.blocks.empty(), "draft must be 0 without draft blocks, got 1");
    if (params.log_probs) {
        const kvspn_tensor& log_probs = *params.log_probs;
        check_tensor("log_probs", log_probs, {Dtype::fp32}, {batch_.rows, batch_.token_capacity});
        check_contiguous("log_probs", log_probs);
    }
    const kvspn_tensor* drafts = params.draft_tokens;
    if (!drafts) return;
    require(!params.draft, "draft must be 0 with draft_tokens, got 1");
    check_tensor("draft_tokens", *drafts, {Dtype::int32}, {batch_.rows, kAny});
    require(drafts->shape[1] < kMostQueries, "draft_tokens must hold 0 to ", kMostQueries - 1,
            " of a row, got ", drafts->shape[1]);
    require(!runner_->asynchronous() || drafts->shape[1] < 2 || drafts->strides[1] == 1,
            "draft_tokens must be contiguous in a row, got stride ", drafts->strides[1]);
}

void Engine::step(const kvspn_step_params& params) {
    kvspn_generate_params once{};
    once.step = params, once.max_steps = 1;
    generate(once);
}

void Engine::generate(const kvspn_generate_params& params) {
    check_step(params.step);
    require(params.max_steps >= 0, "max_steps must be at least 0, got ", params.max_steps);
    require(!params.step.draft_tokens || params.max_steps == 1,
            "draft_tokens must be null but for one step, got a tensor");
    kvspn_step_params step = params.step;
    if (params.first_mask) step.first_mask = params.first_mask;
    // The host does not wait between steps, each of which makes a token.
    if (!params.on_step && runner_->asynchronous())
        return runner_->run(step, params.max_steps ? params.max_steps : step.max_length);
    for (int n = 0; !params.max_steps || n < params.max_steps; ++n) {
        if (!find_unfinished()) return;  // of what on_step may have bound
        runner_->run(step, 1);
        runner_->wait();
        check_tokens();
        if (params.on_step && params.on_step(params.context)) return;
    }
}

// Which rows the next step is for, and whether there are any.
bool Engine::find_unfinished() {
    runner_->read(finished_.data(), batch_.finished, finished_.size());
    return std::find(finished_.begin(), finished_.end(), 0) != finished_.end();
}

void Engine::check_tokens() const {
    for (int row = 0; row < batch_.rows; ++row)
        if (!finished_[size_t(row)]) check_token(row);
}

// -1 as a row's newest token is what a step without a token leaves.
void Engine::check_token(int row) const {
    const Shown shown = runner_->shown(row);
    if (shown.count && shown.tokens[shown.count - 1] < 0) throw NoToken(row, shown.count - 2);
}

int Engine::plan(const kvspn_step_params& params, kvspn_stage* stages, int capacity) {
    check_step(params);
    find_unfinished();
    const std::vector<int64_t> bytes = bytes_of_stages(params);
    const int first = params.draft ? 0 : plan_.base;
    for (int i = 0; i < std::min(int(bytes.size()), capacity); ++i)
        stages[i] = {plan_.stages[size_t(first + i)].name, 0, bytes[size_t(i)]};
    return int(bytes.size());
}

int Engine::profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity) {
    check_step(params);
    find_unfinished();
    const std::vector<int64_t> bytes = bytes_of_stages(params);
    const int first = params.draft ? 0 : plan_.base;
    int count = 0;
    const auto note = [&](const kvspn_stage& stage) {
        if (count < capacity) stages[count] = stage;
        ++count;
    };
    const std::vector<Timing> timings = runner_->profile(params);
    for (size_t i = 0; i < timings.size(); ++i) {
        note({plan_.stages[size_t(first) + i].name, timings[i].stage, bytes[i]});
        if (timings[i].barrier >= 0) note({"barrier", timings[i].barrier, 0});
    }
    check_tokens();
    return count;
}

// Of weights, and of keys and values at the positions of unfinished rows, that each stage of a step must
// read.
std::vector<int64_t> Engine::bytes_of_stages(const kvspn_step_params& params) const {
    const size_t rows = size_t(batch_.rows);
    std::vector<int32_t> lengths(rows), encoded(rows);
    runner_->read(lengths.data(), batch_.self.lengths, rows * sizeof(int32_t));
    runner_->read(encoded.data(), batch_.cross.lengths, rows * sizeof(int32_t));
    std::vector<int64_t> bytes;
    for (size_t i = params.draft ? 0 : size_t(plan_.base); i < plan_.stages.size(); ++i) {
        const Stage& stage = plan_.stages[i];
        if (stage.matrix) {
            bytes.push_back(stage.matrix->bytes());
            continue;
        }
        int64_t positions = 0;
        const int stride = stage.cross && stage.draft ? weights_.architecture.encoder_stride : 1;
        for (size_t row = 0; stage.kind == Kind::attend && row < rows; ++row) {
            if (finished_[row]) continue;
            const int64_t length = std::clamp(lengths[row], 0, batch_.self.capacity),
                          states = std::clamp(encoded[row], 0, batch_.cross.capacity);
            positions += stage.causal
                             ? std::min<int64_t>(length + 1 + drafts_of(params), batch_.self.capacity)
                         : stage.cross ? (states + stride - 1) / stride
                                       : length;
        }
        const int64_t each = batch_.head_dim * int64_t(size_of(batch_.dtype)) + (batch_.self.scales ? 4 : 0);
        bytes.push_back(2 * stage.layers * batch_.heads * positions * each);
    }
    return bytes;
}

void Engine::rollback(int row, int length) {
    check_row(row);
    int32_t present;
    runner_->read(&present, batch_.self.lengths + row, sizeof present);
    present = std::min(present, batch_.self.capacity);
    require(length >= 0 && length <= present, "length must be 0 to ", present, ", got ", length);
    const int32_t shortened = length;
    const uint8_t unfinished = 0;
    runner_->write(batch_.self.lengths + row, &shortened, sizeof shortened);
    runner_->write(batch_.finished + row, &unfinished, sizeof unfinished);
    runner_->forget(row, length + 1);
}

void Engine::reset() {
    check_bound();
    const size_t rows = size_t(batch_.rows);
    const std::vector<int32_t> zeros(3 * rows);
    const std::vector<uint8_t> ones(rows, 1);
    runner_->write(batch_.self.lengths, zeros.data(), rows * sizeof(int32_t));
    runner_->write(batch_.cross.lengths, zeros.data(), rows * sizeof(int32_t));
    runner_->write(batch_.finished, ones.data(), rows);
    runner_->write(batch_.stats, zeros.data(), 3 * rows * sizeof(int32_t));
    runner_->wait();
    for (int row = 0; row < batch_.rows; ++row) prefilled_[size_t(row)] = 0, runner_->forget(row, 0);
}

void Engine::read_statistics(int row, kvspn_statistics& statistics) const {
    if (row == -1)
        check_bound();
    else
        check_row(row);
    const size_t rows = size_t(batch_.rows);
    std::vector<int32_t> lengths(rows), stats(3 * rows);
    runner_->read(lengths.data(), batch_.self.lengths, rows * sizeof(int32_t));
    runner_->read(stats.data(), batch_.stats, stats.size() * sizeof(int32_t));
    if (runner_->asynchronous())
        for (int r = 0; r < batch_.rows; ++r) check_token(r);
    statistics.tokens = statistics.steps = statistics.drafted = statistics.accepted = 0;
    for (size_t r = size_t(row == -1 ? 0 : row); r < (row == -1 ? rows : size_t(row) + 1); ++r) {
        statistics.tokens += std::max<int64_t>(int64_t(lengths[r]) - prefilled_[r], 0);
        statistics.steps += stats[3 * r];
        statistics.drafted += stats[3 * r + 1];
        statistics.accepted += stats[3 * r + 2];
    }
}

int Engine::progress(int row, int32_t* tokens, int capacity) const {
    check_row(row);
    if (runner_->asynchronous()) check_token(row);
    const Shown shown = runner_->shown(row);
    const int first = prefilled_[size_t(row)] + 1, count = std::max(shown.count - first, 0);
    for (int i = 0; i < std::min(count, capacity); ++i) tokens[i] = shown.tokens[first + i];
    return count;
}

}  // namespace kvspn
