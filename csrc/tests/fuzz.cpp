// The C ABI under random calls: fuzz SECONDS [SEED]. Whatever it is handed, it answers with a status, a
// refused call changes nothing, and afterwards the engine decodes as before. Sanitizers see to the rest.
//
// A tensor is damaged only so that it stays within its memory, or has to be refused: that a caller's shape is
// larger than the memory behind it cannot be told.
#include <unistd.h>

#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <utility>

#include "model.h"

namespace {

constexpr int64_t kAbsurd[] = {
    -1, INT64_MIN, INT64_MAX, int64_t(1) << 31, int64_t(1) << 61, int64_t(1) << 62};
constexpr int64_t kFar[] = {INT64_MIN, INT64_MAX, int64_t(1) << 41, -(int64_t(1) << 61), int64_t(1) << 62};
constexpr int32_t kNumbers[] = {INT_MIN, -2, -1, 0, 1, 2, 3, kCapacity - 1, kCapacity, kVocabulary, INT_MAX};

std::mt19937 random_bits;
long calls = 0, refused = 0;

bool chance(int percent) { return int(random_bits() % 100) < percent; }
template <class T, size_t N>
T any_of(const T (&values)[N]) {
    return values[random_bits() % N];
}
int32_t number() { return any_of(kNumbers); }

// Whether a call was made; what is refused has a text.
bool made(kvspn_status status) {
    ++calls;
    const bool ok = status == KVSPN_OK || status == KVSPN_NO_TOKEN;
    CHECK(ok || status == KVSPN_INVALID_ARGUMENT);
    CHECK(status == KVSPN_OK || std::strstr(kvspn_last_error(), "must "));
    refused += !ok;
    return ok;
}

void damage(kvspn_tensor& tensor) {
    const int at = tensor.ndim ? int(random_bits() % tensor.ndim) : 0;
    switch (random_bits() % 6) {
        case 0:
            tensor.shape[at] = any_of(kAbsurd);
            break;
        case 1:
            tensor.shape[at] -= tensor.shape[at] > 0 ? 1 + random_bits() % tensor.shape[at] : 0;
            break;
        case 2:
            tensor.strides[at] = chance(50) ? any_of(kFar) : 0;
            break;
        case 3:
            tensor.ndim = any_of({-1, 0, 1, 2, 3, 4, 5, 6, 7, 1 << 30});
            break;
        case 4:
            tensor.dtype = any_of({-1, 7, 1 << 30, tensor.dtype == KVSPN_FP32 ? int(KVSPN_BF16) : -1});
            break;
        default:
            tensor.data = nullptr;
    }
}

// Of the tensors of a call: damages one.
void damage_one(std::initializer_list<kvspn_tensor*> tensors) {
    damage(**(tensors.begin() + random_bits() % tensors.size()));
}

template <class Params>
void set_size(Params& params) {
    params.struct_size = chance(3) ? uint32_t(number()) : uint32_t(sizeof params);
}

void create(const Model& model) {
    std::vector<kvspn_tensor> weights = model.tensors();
    std::vector<float> scale(kVocabulary, 1.f);
    kvspn_engine_params params{0, kLayers,          kHeads, 1, 1, 0, int32_t(random_bits() % 3),
                               0, KVSPN_DEVICE_CPU, nullptr};
    set_size(params);
    switch (random_bits() % 4) {
        case 0:  // a head of int4, whose groups are absurd
            for (kvspn_tensor& tensor : weights)
                if (!std::strcmp(tensor.name, "head.weight"))
                    tensor.dtype = KVSPN_INT4, tensor.shape[1] /= 2, tensor.strides[0] /= 2;
            weights.push_back(tensor("head.scale", scale.data(), KVSPN_FP32, {kVocabulary, 1}));
            weights.back().shape[1] = any_of(kAbsurd);
            break;
        case 1:
            *any_of({&params.layers, &params.heads, &params.blocks, &params.groups, &params.encoder_stride,
                     &params.device}) = number();
            break;
        case 2:
            params.threads = any_of({INT_MIN, -1, 1025, INT_MAX});
            break;
        default:
            damage(weights[random_bits() % weights.size()]);
    }
    kvspn_engine* engine = nullptr;
    if (made(kvspn_engine_create(chance(2) ? nullptr : &params, weights.data(), int32_t(weights.size()),
                                 &engine)))
        kvspn_engine_destroy(engine);
    else
        CHECK(!engine);
}

// Random calls on a bound engine, whose buffers hold anything.
void use(kvspn_engine* engine, Batch& batch) {
    if (chance(60)) {
        for (int32_t& length : batch.lengths) length = number();
        for (int32_t& length : batch.cross_lengths) length = number();
        for (int32_t& count : batch.stats) count = number();
        for (int32_t& token : batch.tokens)
            token = chance(50) ? number() : int32_t(random_bits() % kVocabulary);
        for (uint8_t& flag : batch.finished) flag = chance(70) ? 0 : uint8_t(random_bits());
    }
    const Batch::State before = batch.state();
    const int32_t row = chance(80) ? int32_t(random_bits() % kRows) : number();
    kvspn_step_params step = Batch::step_params(1);
    set_size(step);
    if (chance(50)) *any_of({&step.k, &step.eos, &step.max_length, &step.draft}) = number();
    int32_t drafts[kRows * 18];
    for (int32_t& token : drafts) token = chance(20) ? number() : int32_t(random_bits() % kVocabulary);
    kvspn_tensor given = tensor("draft_tokens", drafts, KVSPN_INT32, {kRows, int64_t(random_bits() % 18)});
    if (chance(20)) damage(given);
    if (chance(40)) step.draft_tokens = &given, step.draft = chance(10);
    bool ok = true;
    switch (random_bits() % 9) {
        case 0: {
            kvspn_batch other = batch.view();
            set_size(other);
            damage_one({&other.kv, &other.lengths, &other.tokens, &other.finished, &other.stats,
                        &other.cross_kv, &other.cross_lengths});
            ok = made(kvspn_engine_bind(engine, &other));
            CHECK(!ok || made(kvspn_engine_bind(engine, &(other = batch.view()))));
            break;
        }
        case 1: {
            kvspn_tensor states = batch.states();
            if (chance(50)) damage(states);
            ok = made(kvspn_engine_encode(engine, row, chance(5) ? nullptr : &states));
            break;
        }
        case 2:
            if (chance(50)) {
                ok = made(kvspn_engine_prefill(engine, row, number()));
            } else {
                float values[kVocabulary];
                kvspn_tensor logits = tensor("logits", values, KVSPN_FP32, {kVocabulary});
                if (chance(20)) damage(logits);
                ok = made(kvspn_engine_prefill_from(engine, row, number(), number(), number(),
                                                    chance(30) ? nullptr : &logits));
            }
            break;
        case 3:
            ok = made(kvspn_engine_step(engine, &step));
            break;
        case 4: {
            kvspn_generate_params params{0, step, nullptr, number(), nullptr, nullptr};
            set_size(params);
            if (chance(30)) params.on_step = [](void*) -> int32_t { return chance(20); };
            ok = made(kvspn_engine_generate(engine, &params));
            if (!ok) return;  // the steps before the one that was refused were made
            break;
        }
        case 5:
            ok = made(kvspn_engine_rollback(engine, row, number()));
            break;
        case 6: {
            kvspn_statistics statistics{};
            set_size(statistics);
            ok = made(kvspn_engine_read_statistics(engine, row, &statistics));
            break;
        }
        case 7: {
            int32_t tokens[kCapacity], count = 0;
            ok = made(kvspn_engine_progress(engine, row, tokens, chance(80) ? kCapacity : any_of({-1, 0, 1}),
                                            &count));
            CHECK(!ok || (count >= 0 && count <= kCapacity));
            break;
        }
        default:
            ok = made(kvspn_engine_reset(engine));
    }
    CHECK(ok || batch.state() == before);
}

// An encoder of damaged weights, and one of whole ones with damaged features or states.
void encode(const Model& model, kvspn_encoder* encoder) {
    std::vector<kvspn_tensor> weights = model.tensors();
    kvspn_encoder_params params{0,
                                kLayers,
                                kHeads,
                                any_of({KVSPN_FP32, KVSPN_BF16, KVSPN_INT8}),
                                int32_t(random_bits() % 3),
                                int32_t(chance(50)),
                                nullptr};
    set_size(params);
    if (chance(40))
        *any_of({&params.layers, &params.heads, &params.format}) = number();
    else
        damage(weights[random_bits() % weights.size()]);
    kvspn_encoder* other = nullptr;
    if (made(kvspn_encoder_create(&params, weights.data(), int32_t(weights.size()), &other)))
        kvspn_encoder_destroy(other);
    else
        CHECK(!other);
    Sound sound;
    kvspn_tensor from = sound.input(), to = sound.output();
    if (chance(80)) damage_one({&from, &to});
    if (chance(20)) sound.features[random_bits() % sound.features.size()] = NAN;
    const std::vector<float> before = sound.states;
    if (!made(kvspn_encoder_encode(encoder, chance(5) ? nullptr : &from, &to))) CHECK(sound.states == before);
}

// Sound of any length, damaged as a rule.
void log_mel(kvspn_encoder* encoder) {
    const size_t frames = random_bits() % 9, count = frames ? 160 * frames - random_bits() % 160 : 0;
    std::vector<float> samples(count, 0.25f), features(kBands * frames, 7);
    if (count && chance(30)) samples[random_bits() % count] = any_of({NAN, INFINITY, -INFINITY, 3e38f});
    kvspn_tensor from = tensor("samples", samples.data(), KVSPN_FP32, {int64_t(count)}),
                 to = tensor("features", features.data(), KVSPN_FP32, {kBands, int64_t(frames)});
    if (chance(60)) damage_one({&from, &to});
    const std::vector<float> before = features;
    if (!made(kvspn_encoder_log_mel(encoder, chance(5) ? nullptr : &from, &to))) CHECK(features == before);
}

// A model's file as kvspn_model_open takes it: of its vocabulary 0 to 9 are text, 18 to 28 timestamps.
std::string file_of(const Model& model) {
    static const char words[] = "a b\xe4\xbd\xa0\xff c";
    std::string header = "{\"__metadata__\":{", data;
    const std::pair<const char*, int> numbers[] = {{"layers", kLayers},
                                                   {"heads", kHeads},
                                                   {"blocks", 1},
                                                   {"groups", 1},
                                                   {"last_layer_only", 0},
                                                   {"encoder_stride", 1},
                                                   {"encoder_layers", kLayers},
                                                   {"encoder_heads", kHeads},
                                                   {"encoder_format", any_of({0, 1, 3})},
                                                   {"encoder_output_positions", 0},
                                                   {"eos", 10},
                                                   {"start", 11},
                                                   {"language.de", 12},
                                                   {"language.en", 13},
                                                   {"target.en", 13},
                                                   {"task.transcribe", 14},
                                                   {"task.translate", 15},
                                                   {"no_speech", chance(80) ? 16 : -1},
                                                   {"no_timestamps", 17},
                                                   {"target_follows_task", int(chance(50))}};
    for (const auto& [name, value] : numbers)
        header += std::string(header.back() == '{' ? "" : ",") + '"' + name + "\":\"" +
                  std::to_string(chance(1) ? number() : value) + '"';
    header += "}";
    std::vector<float> mask(kVocabulary);
    std::vector<int32_t> ends;
    for (int i = 0; i < kVocabulary; ++i) ends.push_back(std::min(i + 1, int(sizeof words) - 1));
    std::vector<kvspn_tensor> tensors = model.tensors();
    for (const char* name : {"mask", "first_mask"})
        tensors.push_back(tensor(name, mask.data(), KVSPN_FP32, {kVocabulary}));
    tensors.push_back(tensor("vocabulary.ends", ends.data(), KVSPN_INT32, {kVocabulary}));
    tensors.push_back(tensor("vocabulary.bytes", const_cast<char*>(words), KVSPN_INT4, {sizeof words - 1}));
    for (const kvspn_tensor& t : tensors) {
        const bool bytes = t.dtype == KVSPN_INT4;
        std::string shape;
        int64_t size = bytes ? 1 : 4;
        for (int i = 0; i < t.ndim; ++i)
            size *= t.shape[i], shape += (i ? "," : "") + std::to_string(t.shape[i]);
        header += std::string(",\"") + t.name + "\":{\"dtype\":\"" +
                  (bytes                    ? "U8"
                   : t.dtype == KVSPN_INT32 ? "I32"
                                            : "F32") +
                  "\",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(data.size()) + ',' +
                  std::to_string(data.size() + size_t(size)) + "]}";
        data.append(static_cast<const char*>(t.data), size_t(size));
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

// A file that is damaged as a rule, opened, and sound of any kind.
void transcribe(const Model& model) {
    static const std::string path = [] {
        std::string name = std::filesystem::temp_directory_path() / "kvspn-fuzz-XXXXXX";
        CHECK(close(mkstemp(name.data())) == 0);
        return name;
    }();
    std::string content = file_of(model);
    const size_t header = content.find("}}") + 2;
    if (chance(30)) content.resize(random_bits() % content.size());
    for (int n = chance(70) ? int(random_bits() % 4) : 0; n > 0; --n)  // mostly in the header
        if (!content.empty()) {
            char& byte =
                content[random_bits() % (chance(80) ? std::min(header, content.size()) : content.size())];
            byte = chance(50) ? char(random_bits()) : any_of({'0', '9', '"', '{', '}', '[', ',', '\\'});
        }
    std::ofstream(path, std::ios::binary) << content;
    kvspn_model_params own{0, int32_t(random_bits() % 3), nullptr};
    set_size(own);
    kvspn_model* opened = nullptr;
    const bool ok = made(kvspn_model_open(path.c_str(), &own, &opened));
    std::remove(path.c_str());
    CHECK(ok == (opened != nullptr));
    if (!ok) return;
    std::vector<float> samples(random_bits() % 9000);
    Noise noise;
    for (float& value : samples) value = noise.next();
    if (!samples.empty() && chance(20))
        samples[random_bits() % samples.size()] = any_of({NAN, INFINITY, 3e38f});
    int64_t said = 0;
    kvspn_transcribe_params params{};
    params.without_timestamps = chance(30),
    params.language = any_of({(const char*)nullptr, "de", "en", "xx"});
    params.target = any_of({(const char*)nullptr, (const char*)nullptr, "en", "de"});
    params.on_segment = [](void* context, const kvspn_segment* segment) -> int32_t {
        CHECK(segment->start < segment->end && segment->token_count > 0);
        *static_cast<int64_t*>(context) += int64_t(std::strlen(segment->text));
        return chance(5);
    };
    params.context = &said;
    set_size(params);
    made(kvspn_transcribe(opened, samples.data(), chance(3) ? -1 : int64_t(samples.size()), &params));
    kvspn_model_close(opened);
}

// The ops, each on tensors of which one is damaged as a rule.
void op() {
    constexpr int64_t B = 2, H = 2, Q = 3, S = 20, D = 8, N = 40;
    std::vector<float> x(2 * B * H * Q * D * N, 0.5f), y(x.size()), kv(2 * 2 * B * H * S * D, 0.25f);
    std::vector<int32_t> ids(B * N), lengths(B), more(3 * B), ranks(B * N), best(2 * B * Q);
    for (std::vector<int32_t>* each : {&ids, &lengths, &more, &ranks})
        for (int32_t& value : *each) value = number();
    uint8_t finished[B] = {0, uint8_t(chance(50))};
    std::vector<std::vector<char>> memory;
    kvspn_stream stream{};
    stream.allocate = [](void* context, int64_t bytes) -> void* {
        auto& pieces = *static_cast<std::vector<std::vector<char>>*>(context);
        pieces.emplace_back(size_t(bytes) + 16);
        return reinterpret_cast<void*>((uintptr_t(pieces.back().data()) + 15) / 16 * 16);
    };
    stream.context = &memory;
    stream.run = [](void*, int32_t parts, void (*work)(void*, int32_t), void* argument) {
        for (int32_t part = parts; part-- > 0;) work(argument, part);
    };
    stream.threads = chance(80) ? 3 : number();
    const kvspn_stream* place = chance(95) ? &stream : nullptr;
    const auto floats = [](const char* name, std::vector<float>& data, const std::vector<int64_t>& shape) {
        return tensor(name, data.data(), KVSPN_FP32, shape);
    };
    const auto integers = [](const char* name, std::vector<int32_t>& data,
                             const std::vector<int64_t>& shape) {
        return tensor(name, data.data(), KVSPN_INT32, shape);
    };
    const bool damaged = chance(80);
    switch (random_bits() % 6) {
        case 0: {
            kvspn_attention_params p{};
            p.q = floats("q", x, {B, 2 * H, Q, D}), p.kv = floats("kv", kv, {2, 2, B, H, S, D});
            p.lengths = integers("lengths", lengths, {B}), p.out = floats("out", y, {B, Q, 2 * H * D});
            kvspn_tensor tail = floats("tail", x, {2, B, H, Q, D}),
                         tails = integers("tail_lengths", more, {B});
            if (chance(50)) p.tail = &tail, p.tail_lengths = &tails;
            p.scale = 1, p.causal = chance(50), p.stream = place;
            set_size(p);
            if (damaged) damage_one({&p.q, &p.kv, &p.lengths, &p.out, &tail, &tails});
            made(kvspn_flat_kv_attention(&p));
            break;
        }
        case 1: {
            kvspn_linear_params p{};
            p.x = floats("x", x, {B * Q, D}), p.weight = floats("weight", kv, {N, D});
            p.out = floats("out", y, {B * Q, N}), p.eps = chance(95) ? 1e-5f : 0, p.gelu = chance(50);
            if (chance(50)) p.bias = floats("bias", x, {N}), p.residual = floats("residual", x, {B * Q, N});
            if (chance(50))
                p.norm_weight = floats("norm_weight", x, {D}), p.norm_bias = floats("norm_bias", x, {D});
            if (chance(30)) {  // int4
                p.weight = tensor("weight", kv.data(), KVSPN_INT4, {N, D / 2});
                p.scale = floats("scale", x, {N, 1});
                if (chance(50)) p.scale.shape[1] = any_of(kAbsurd);
            }
            p.stream = place;
            set_size(p);
            if (damaged)
                damage_one({&p.x, &p.weight, &p.out, &p.bias, &p.residual, &p.norm_weight, &p.scale});
            made(kvspn_fused_linear(&p));
            break;
        }
        case 2: {
            kvspn_verify_params p{};
            p.x = floats("x", x, {B, Q, D}), p.weight = floats("weight", kv, {N, D});
            p.draft = integers("draft", ids, {B, Q - 1}), p.argmax = integers("argmax", ranks, {B, Q});
            p.rank = integers("rank", more, {B, Q - 1}), p.eps = 1e-5f, p.stream = place;
            if (chance(50)) p.mask = floats("mask", x, {N});
            if (chance(50)) {
                p.best_tokens = integers("best_tokens", best, {B, Q, 2});
                p.best_logits = floats("best_logits", y, {B, Q, 2});
            }
            set_size(p);
            if (damaged)
                damage_one(
                    {&p.x, &p.weight, &p.draft, &p.argmax, &p.rank, &p.mask, &p.best_tokens, &p.best_logits});
            made(kvspn_lm_head_verify(&p));
            break;
        }
        case 3: {
            kvspn_append_params p{};
            p.kv = floats("kv", kv, {2, 2, B, H, S, D}), p.k = floats("k", x, {B, H, Q, D});
            p.v = floats("v", y, {B, H, Q, D}), p.lengths = integers("lengths", lengths, {B});
            if (chance(50)) p.finished = tensor("finished", finished, KVSPN_BOOL, {B});
            p.layer = chance(80) ? 1 : number(), p.stream = chance(50) ? place : nullptr;
            set_size(p);
            if (damaged) damage_one({&p.kv, &p.k, &p.v, &p.lengths, &p.finished});
            made(kvspn_append_kv(&p));
            break;
        }
        case 4: {
            kvspn_accept_params p{};
            p.tokens = integers("tokens", ids, {B, N}), p.lengths = integers("lengths", lengths, {B});
            p.finished = tensor("finished", finished, KVSPN_BOOL, {B});
            p.stats = integers("stats", more, {B, 3}), p.draft = integers("draft", ids, {B, Q - 1});
            p.rank = integers("rank", ranks, {B, Q - 1}), p.argmax = integers("argmax", ranks, {B, Q});
            p.k = chance(70) ? 1 : number(), p.eos = number(),
            p.max_length = chance(70) ? int32_t(N) : number();
            p.stream = place;
            set_size(p);
            if (damaged)
                damage_one({&p.tokens, &p.lengths, &p.finished, &p.stats, &p.draft, &p.rank, &p.argmax});
            made(kvspn_accept_and_rollback(&p));
            break;
        }
        default: {
            kvspn_compact_params p{};
            p.kv = floats("kv", kv, {2, 2, B, H, S, D}), p.rows = integers("rows", lengths, {B});
            p.source = integers("source", ids, {B, Q}), p.start = integers("start", more, {B}),
            p.stream = place;
            set_size(p);
            if (damaged) damage_one({&p.kv, &p.rows, &p.source, &p.start});
            made(kvspn_compact_kv(&p));
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
    std::printf("seed %u\n", seed);
    random_bits.seed(seed);
    const Model model;
    kvspn_engine* engine = model.engine(2);
    Batch batch(engine);
    const std::vector<int32_t> expected = batch.generate(0);
    kvspn_encoder* encoder = model.encoder(KVSPN_FP32, 2);
    Sound sound;
    CHECK(sound.encode(encoder) == KVSPN_OK);
    const std::vector<float> states = sound.states;
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        create(model);
        for (int n = 0; n < 40; ++n) use(engine, batch);
        for (int n = 0; n < 40; ++n) op();
        for (int n = 0; n < 10; ++n) encode(model, encoder);
        for (int n = 0; n < 10; ++n) log_mel(encoder);
        for (int n = 0; n < 20; ++n) transcribe(model);
        CHECK(batch.generate(1) == expected);
        CHECK(sound.encode(encoder) == KVSPN_OK && sound.states == states);
    }
    kvspn_engine_destroy(engine);
    kvspn_encoder_destroy(encoder);
    std::printf("%ld calls, %ld of them refused\n", calls, refused);
}
