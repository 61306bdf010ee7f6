#include "common/model.h"

#include <algorithm>
#include <cmath>
#include <future>

#include "common/backend.h"
#include "common/error.h"

namespace kvspn {
namespace {

constexpr int kHop = 160;                         // samples from one frame to the next
constexpr int kRate = 100;                        // frames a second
constexpr double kStep = 0.02;                    // seconds from one timestamp to the next
constexpr int kLatest = 50;                       // of these, to a window's first
constexpr double kSilence = 0.6, kLikely = -1.0;  // "no speech" is believed above and below these

kvspn_tensor tensor(const char* name, void* data, Dtype dtype, std::initializer_list<int64_t> shape) {
    kvspn_tensor made{};
    made.name = name, made.data = data, made.dtype = int32_t(dtype), made.ndim = int32_t(shape.size());
    int64_t stride = 1;
    for (int i = made.ndim; i-- > 0; stride *= made.shape[i])
        made.shape[i] = shape.begin()[i], made.strides[i] = stride;
    return made;
}

std::vector<float> read_mask(const ModelFile& file, const char* name, int vocabulary) {
    const kvspn_tensor& mask = file.tensor(name, {Dtype::fp32}, {vocabulary});
    const float* values = static_cast<const float*>(mask.data);
    return {values, values + vocabulary};
}

std::unique_ptr<Engine> open_engine(const ModelFile& file, const kvspn_model_params& params) {
    kvspn_engine_params own{};
    own.struct_size = sizeof own;
    own.layers = file.number("layers", 1, 1 << 16), own.heads = file.number("heads", 1, 1 << 16);
    own.blocks = file.number("blocks", 0, 1 << 16), own.groups = file.number("groups", 1, 1 << 16);
    own.last_layer_only = file.number("last_layer_only", 0, 1);
    own.encoder_stride = file.number("encoder_stride", 1, 1 << 16);
    own.threads = params.threads, own.variant = params.variant;
    const std::vector<kvspn_tensor> weights = file.tensors();
    return std::make_unique<Engine>(own, weights.data(), int(weights.size()));
}

std::unique_ptr<Encoder> open_encoder(const ModelFile& file, const kvspn_model_params& params) {
    kvspn_encoder_params own{};
    own.struct_size = sizeof own;
    own.layers = file.number("encoder_layers", 0, 1 << 16);
    own.heads = file.number("encoder_heads", 1, 1 << 16);
    own.format = file.number("encoder_format", 0, int(Dtype::fp8));
    own.output_positions = file.number("encoder_output_positions", 0, 1);
    own.threads = params.threads, own.variant = params.variant;
    const std::vector<kvspn_tensor> weights = file.tensors();
    return cpu_backend.make_encoder(own, weights.data(), int(weights.size()));
}

double to_milliseconds(double seconds) { return std::round(seconds * 1000) / 1000; }

}  // namespace

double split(const std::vector<int32_t>& tokens, int begin, double seconds, std::vector<Piece>& pieces) {
    const auto time = [&](size_t i) { return (tokens[i] - begin) * kStep; };
    std::vector<size_t> ends;  // a segment lies between a timestamp and the second of the pair that ends it
    for (size_t i = 1; i < tokens.size(); ++i)
        if (tokens[i - 1] >= begin && tokens[i] >= begin) ends.push_back(i);
    pieces.clear();
    if (ends.empty()) {
        double end = seconds;
        for (size_t i = 0; i < tokens.size(); ++i)
            if (tokens[i] > begin) end = time(i);
        pieces.push_back({0, end, 0, tokens.size()});
        return seconds;
    }
    // What ends in a single timestamp was the last that is said in this window.
    const bool finished = tokens[tokens.size() - 2] < begin && tokens.back() >= begin;
    if (finished) ends.push_back(tokens.size());
    size_t first = 0;
    for (const size_t end : ends) {
        pieces.push_back({std::max(0.0, time(first)), std::max(0.0, time(end - 1)), first, end});
        first = end;
    }
    // Without a step forward the same window would come again, for ever.
    return finished || pieces.back().end <= 0 ? seconds : pieces.back().end;
}

Model::Model(const char* path, const kvspn_model_params& params) : Model(ModelFile(path), params) {}

Model::Model(const ModelFile& file, const kvspn_model_params& params)
    : words_(file, int(file.tensor("embed_tokens", kFloats, {kAny, kAny}).shape[0])) {
    // Both pack their weights, which takes most of the time; the system has threads for two or it has not.
    auto decoder = std::async(params.threads == 1 ? std::launch::deferred : std::launch::async,
                              [&] { return open_engine(file, params); });
    encoder_ = open_encoder(file, params);
    engine_ = decoder.get();

    const kvspn_tensor &embedded = file.tensor("embed_tokens", kFloats, {kAny, kAny}),
                       &conv = file.tensor("encoder.conv1.weight", kFloats, {kAny, kAny, 3});
    vocabulary_ = int(embedded.shape[0]), width_ = int(embedded.shape[1]), bands_ = int(conv.shape[1]);
    require(conv.shape[0] == width_, "encoder.conv1.weight must have ", width_,
            " outputs, as many as the decoder is wide, got ", conv.shape[0]);
    positions_ = int(file.tensor("encoder.embed_positions", kFloats, {kAny, width_}).shape[0]);
    capacity_ = int(file.tensor("embed_positions", kFloats, {kAny, width_}).shape[0]);
    layers_ = file.number("layers", 1, 1 << 16), heads_ = file.number("heads", 1, 1 << 16);
    drafts_ = file.number("blocks", 0, 1 << 16) > 0;
    const int last = vocabulary_ - 1;
    end_ = file.number("eos", 0, last), start_ = file.number("start", 0, last);
    begin_ = file.number("no_timestamps", 0, last) + 1;
    require(end_ < begin_, "eos must be below no_timestamps, ", begin_ - 1, ", got ", end_);
    no_speech_ = file.number("no_speech", -1, last);
    languages_ = file.numbers("language.", 0, last), targets_ = file.numbers("target.", 0, last);
    tasks_ = file.numbers("task.", 0, last);
    require(languages_.empty() || (tasks_.count("transcribe") && tasks_.count("translate")),
            "task.transcribe and task.translate must be said in the file's metadata, got nothing");
    target_follows_task_ = file.number("target_follows_task", 0, 1);
    mask_ = read_mask(file, "mask", vocabulary_), first_mask_ = read_mask(file, "first_mask", vocabulary_);
    const int longest_prompt = 5;
    require(capacity_ > longest_prompt, "embed_positions must have more than ", longest_prompt, " rows, got ",
            capacity_);
    bind(Dtype(embedded.dtype));
}

// A batch of one; the caches have the embeddings' dtype, as in Python.
void Model::bind(Dtype dtype) {
    const int64_t elements = int64_t(layers_) * 2 * width_;
    require(elements <= kMostElements / std::max(capacity_, positions_),
            "embed_positions must leave room for a cache, got ", std::max(capacity_, positions_), " rows");
    kv_ = Memory(size_t(elements) * capacity_ * size_of(dtype), false);
    cross_kv_ = Memory(size_t(elements) * positions_ * size_of(dtype), false);
    tokens_.resize(size_t(capacity_)), log_probs_.resize(size_t(capacity_));
    logits_.resize(size_t(vocabulary_));
    window_.resize(size_t(bands_) * 2 * positions_), states_.resize(size_t(positions_) * width_);
    const int head = width_ / heads_;
    kvspn_batch batch{};
    batch.struct_size = sizeof batch;
    batch.kv = tensor("kv", kv_.as<void>(), dtype, {layers_, 2, 1, heads_, capacity_, head});
    batch.lengths = tensor("lengths", &length_, Dtype::int32, {1});
    batch.tokens = tensor("tokens", tokens_.data(), Dtype::int32, {1, capacity_});
    batch.finished = tensor("finished", &finished_, Dtype::boolean, {1});
    batch.stats = tensor("stats", stats_, Dtype::int32, {1, 3});
    batch.cross_kv =
        tensor("cross_kv", cross_kv_.as<void>(), dtype, {layers_, 2, 1, heads_, positions_, head});
    batch.cross_lengths = tensor("cross_lengths", &encoded_, Dtype::int32, {1});
    engine_->bind(batch);
}

void Model::transcribe(const kvspn_tensor& samples, const kvspn_transcribe_params& params) {
    require(params.on_segment, "on_segment must be given, got a null pointer");
    require(params.without_timestamps == 0 || params.without_timestamps == 1,
            "without_timestamps must be 0 or 1, got ", params.without_timestamps);
    const auto known = [&](const char* code) {
        return languages_.empty() ? std::string(code) == "en" : languages_.count(code) > 0;
    };
    require(!params.language || known(params.language),
            "language must be the code of one that the model knows, got ", params.language);
    require(!params.target || known(params.target),
            "target must be the code of a language that the model knows, got ", params.target);
    check_tensor("samples", samples, {Dtype::fp32}, {kAny});
    const int64_t frames = (samples.shape[0] + kHop - 1) / kHop, widest = 2 * int64_t(positions_);
    const bool has_timestamps = begin_ < vocabulary_, timed = has_timestamps && !params.without_timestamps;
    // As in Python, what a window lacks is zeros among the features, and to a model that knows no timestamps
    // silence.
    const int64_t known_frames = has_timestamps ? frames : (frames + widest - 1) / widest * widest;
    std::vector<float> silenced, features(size_t(bands_ * known_frames));
    kvspn_tensor sound = samples;
    if (known_frames > frames) {
        const float* own = static_cast<const float*>(samples.data);
        silenced.assign(own, own + samples.shape[0]);
        silenced.resize(size_t(known_frames * kHop));
        sound = tensor("samples", silenced.data(), Dtype::fp32, {known_frames * kHop});
    }
    encoder_->log_mel(sound, tensor("features", features.data(), Dtype::fp32, {bands_, known_frames}));

    const Choice choice = choose(timed);
    std::string language = params.language ? params.language : languages_.empty() ? "en" : "";
    kvspn_segment segment{};
    segment.struct_size = sizeof segment, segment.language_probability = 1;
    kvspn_statistics own{}, &total = params.statistics ? *params.statistics : own;
    total.tokens = total.steps = total.drafted = total.accepted = 0;
    std::vector<Piece> pieces;
    for (int64_t seek = 0; seek < frames;) {
        const int64_t size = std::min(widest, frames - seek);
        listen(features.data(), known_frames, seek);
        if (language.empty()) language = this->language(segment.language_probability);
        const double silent = no_speech();
        const Heard heard = decode(prompt(language, params.target, timed), choice, total);
        if (silent > kSilence && heard.avg_logprob <= kLikely) {
            seek += size;
            continue;
        }
        const double offset = double(seek) / kRate, seconds = double(size) / kRate;
        const double forward = split(heard.tokens, begin_, seconds, pieces);
        segment.language = language.c_str();
        segment.avg_logprob = float(heard.avg_logprob), segment.no_speech_prob = float(silent);
        for (const Piece& piece : pieces) {
            std::vector<int32_t> spoken;
            std::copy_if(heard.tokens.begin() + ptrdiff_t(piece.first),
                         heard.tokens.begin() + ptrdiff_t(piece.last), std::back_inserter(spoken),
                         [&](int32_t token) { return token < end_; });
            const std::string text = words_.text(spoken.data(), spoken.size());
            segment.start = to_milliseconds(offset + piece.start);
            segment.end = to_milliseconds(offset + piece.end);
            if (segment.start >= segment.end || is_blank(text)) continue;
            segment.text = text.c_str();
            segment.tokens = heard.tokens.data() + piece.first;
            segment.token_count = int32_t(piece.last - piece.first);
            segment.cut = !heard.whole && forward == seconds && &piece == &pieces.back();
            if (params.on_segment(params.context, &segment)) return;
        }
        seek += std::max<int64_t>(1, std::llround(forward * kRate));
    }
}

// A window's features, padded with zeros as Whisper's are, into cross-attention's keys and values, and what
// follows the start token then: "no speech" and the languages are asked for there.
void Model::listen(const float* features, int64_t frames, int64_t seek) {
    const int64_t widest = 2 * int64_t(positions_), size = std::min(widest, frames - seek);
    std::fill(window_.begin(), window_.end(), 0.0f);
    for (int64_t band = 0; band < bands_; ++band)
        std::copy_n(features + band * frames + seek, size, window_.data() + band * widest);
    const kvspn_tensor states = tensor("states", states_.data(), Dtype::fp32, {positions_, width_});
    encoder_->encode(tensor("features", window_.data(), Dtype::fp32, {bands_, widest}), states);
    engine_->encode(0, states);
    tokens_[0] = start_;
    const kvspn_tensor logits = tensor("logits", logits_.data(), Dtype::fp32, {vocabulary_});
    engine_->prefill(0, 0, 1, 0, &logits);
}

// The likeliest language behind the start token, and its probability among all.
const std::string& Model::language(float& probability) const {
    const std::pair<const std::string, int>* best = &*languages_.begin();
    for (const auto& each : languages_)
        if (logits_[size_t(each.second)] > logits_[size_t(best->second)]) best = &each;
    double sum = 0;
    for (const auto& [code, token] : languages_)
        sum += std::exp(double(logits_[size_t(token)]) - logits_[size_t(best->second)]);
    probability = float(1 / sum);
    return best->first;
}

double Model::no_speech() const {
    if (no_speech_ < 0) return 0;
    double sum = 0;
    for (const float logit : logits_) sum += std::exp(double(logit) - logits_[size_t(no_speech_)]);
    return 1 / sum;
}

// As kvspn/models/prompts.py has it.
std::vector<int32_t> Model::prompt(const std::string& language, const char* target, bool timed) const {
    std::vector<int32_t> tokens = {start_};
    if (!languages_.empty()) {
        const bool translated = target && language != target;
        require(!translated || targets_.count(target), "target must be the language spoken, ", language,
                ", or one that the model was taught to translate to, got ", target ? target : "");
        tokens.push_back(languages_.at(language));
        tokens.push_back(tasks_.at(translated ? "translate" : "transcribe"));
        if (translated && target_follows_task_) tokens.push_back(targets_.at(target));
    }
    if (!timed) tokens.push_back(begin_ - 1);
    return tokens;
}

Model::Choice Model::choose(bool timed) const {
    Choice choice{mask_, first_mask_, {}};
    for (std::vector<float>* mask : {&choice.mask, &choice.first_mask}) {
        if (timed)
            (*mask)[size_t(begin_) - 1] = -INFINITY;
        else
            std::fill(mask->begin() + begin_, mask->end(), -INFINITY);
    }
    choice.rule.struct_size = sizeof choice.rule;
    if (timed) {
        choice.rule.timestamp_begin = begin_, choice.rule.text_end = end_;
        choice.rule.max_initial = kLatest;
    }
    return choice;
}

Model::Heard Model::decode(const std::vector<int32_t>& prompt, const Choice& choice,
                           kvspn_statistics& total) {
    const int count = int(prompt.size()) - 1;  // that the newest token follows
    std::copy(prompt.begin(), prompt.end(), tokens_.begin());
    std::fill_n(stats_, 3, 0);
    finished_ = 0;
    engine_->prefill(0, std::min(1, count), count, 0, nullptr);
    engine_->set_rule(0, choice.rule);
    const kvspn_tensor log_probs = tensor("log_probs", log_probs_.data(), Dtype::fp32, {1, capacity_});
    kvspn_generate_params params{};
    params.struct_size = sizeof params;
    params.step.struct_size = sizeof params.step;
    params.step.mask = choice.mask.data(), params.first_mask = choice.first_mask.data();
    params.step.k = 1, params.step.eos = end_, params.step.max_length = capacity_;
    params.step.draft = drafts_, params.step.log_probs = &log_probs;
    engine_->generate(params);
    Heard heard;
    const auto first = tokens_.begin() + ptrdiff_t(prompt.size()), last = tokens_.begin() + length_ + 1;
    heard.tokens.assign(first, last);
    double sum = 0;
    for (size_t i = prompt.size(); i <= size_t(length_); ++i) sum += log_probs_[i];
    total.tokens += int64_t(heard.tokens.size()), total.steps += stats_[0];
    total.drafted += stats_[1], total.accepted += stats_[2];
    heard.whole = !heard.tokens.empty() && heard.tokens.back() == end_;
    if (heard.whole) heard.tokens.pop_back();
    heard.avg_logprob = sum / double(heard.tokens.size() + 1);
    return heard;
}

}  // namespace kvspn
