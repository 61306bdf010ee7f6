// A small model with random weights, and a batch for it, on the C ABI.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

#include "kvspn.h"

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, kvspn_last_error()); \
            std::exit(1);                                                                                \
        }                                                                                                \
    } while (0)

constexpr int kLayers = 2, kHeads = 2, kWidth = 16, kHidden = 32, kVocabulary = 29, kRows = 3, kCapacity = 24,
              kStates = 5, kBands = 7;

// Reproducible numbers in [-0.5, 0.5).
struct Noise {
    uint32_t state = 1;
    float next() {
        state = state * 1664525u + 1013904223u;
        return float(state >> 8) / float(1 << 24) - 0.5f;
    }
};

inline kvspn_tensor tensor(const char* name, void* data, int32_t dtype, const std::vector<int64_t>& shape) {
    kvspn_tensor t{name, data, dtype, int32_t(shape.size()), {}, {}};
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
        t.shape[i] = shape[i], t.strides[i] = stride;
        stride *= shape[i];
    }
    return t;
}

class Model {
  public:
    Model() {
        add("embed_tokens", {kVocabulary, kWidth});
        add("embed_positions", {kCapacity, kWidth});
        add("norm.weight", {kWidth}), add("norm.bias", {kWidth});
        add("draft_norm.weight", {kWidth}), add("draft_norm.bias", {kWidth});
        add("head.weight", {kVocabulary, kWidth});
        for (int i = 0; i < kLayers; ++i) {
            const std::string layer = "layers." + std::to_string(i) + ".";
            for (const char* norm : {"self_norm", "cross_norm", "ffn_norm"}) add_norm(layer + norm);
            add(layer + "self_qkv.weight", {3 * kWidth, kWidth});
            add(layer + "self_out.weight", {kWidth, kWidth});
            add(layer + "cross_q.weight", {kWidth, kWidth});
            add(layer + "cross_kv.weight", {2 * kWidth, kWidth});
            add(layer + "cross_out.weight", {kWidth, kWidth});
            add(layer + "fc1.weight", {kHidden, kWidth});
            add(layer + "fc2.weight", {kWidth, kHidden});
        }
        for (const char* norm : {"kv_norm", "ffn_norm"}) add_norm(std::string("blocks.0.") + norm);
        add("blocks.0.kv_q.weight", {kWidth, kWidth});
        add("blocks.0.kv_out.weight", {kWidth, kWidth});
        add("blocks.0.fc1.weight", {kHidden, kWidth});
        add("blocks.0.fc2.weight", {kWidth, kHidden});
        add_matrix("encoder.conv1", {kWidth, kBands, 3});
        add_matrix("encoder.conv2", {kWidth, kWidth, 3});
        add("encoder.embed_positions", {kStates, kWidth});
        add_norm("encoder.norm");
        for (int i = 0; i < kLayers; ++i) {
            const std::string layer = "encoder.layers." + std::to_string(i) + ".";
            for (const char* norm : {"self_norm", "ffn_norm"}) add_norm(layer + norm);
            add_matrix(layer + "self_qkv", {3 * kWidth, kWidth});
            add_matrix(layer + "self_out", {kWidth, kWidth});
            add_matrix(layer + "fc1", {kHidden, kWidth});
            add_matrix(layer + "fc2", {kWidth, kHidden});
        }
    }

    kvspn_engine* engine(int threads) const {
        kvspn_engine_params params{sizeof params, kLayers, kHeads,           1,      1, 0,
                                   threads,       0,       KVSPN_DEVICE_CPU, nullptr};
        kvspn_engine* made = nullptr;
        CHECK(kvspn_engine_create(&params, tensors_.data(), int32_t(tensors_.size()), &made) == KVSPN_OK);
        return made;
    }

    kvspn_encoder* encoder(int32_t format, int threads) const {
        const kvspn_encoder_params params{sizeof params, kLayers, kHeads, format, threads, 0, nullptr};
        kvspn_encoder* made = nullptr;
        CHECK(kvspn_encoder_create(&params, tensors_.data(), int32_t(tensors_.size()), &made) == KVSPN_OK);
        return made;
    }

    const std::vector<kvspn_tensor>& tensors() const { return tensors_; }

  private:
    void add_norm(const std::string& name) {
        add(name + ".weight", {kWidth});
        add(name + ".bias", {kWidth});
    }
    void add_matrix(const std::string& name, const std::vector<int64_t>& shape) {
        add(name + ".weight", shape);
        add(name + ".bias", {shape[0]});
    }
    void add(const std::string& name, const std::vector<int64_t>& shape) {
        int64_t count = 1;
        for (int64_t size : shape) count *= size;
        names_.push_back(name);
        data_.emplace_back(count);
        for (float& value : data_.back()) value = 2 * noise_.next();
        tensors_.push_back(tensor(names_.back().c_str(), data_.back().data(), KVSPN_FP32, shape));
    }

    Noise noise_;
    std::deque<std::string> names_;
    std::deque<std::vector<float>> data_;
    std::vector<kvspn_tensor> tensors_;
};

// Features, and the states that an encoder makes of them.
struct Sound {
    std::vector<float> features = std::vector<float>(kBands * 2 * kStates),
                       states = std::vector<float>(kStates * kWidth);
    Sound() {
        Noise noise;
        for (float& value : features) value = noise.next();
    }
    kvspn_tensor input() { return tensor("features", features.data(), KVSPN_FP32, {kBands, 2 * kStates}); }
    kvspn_tensor output() { return tensor("states", states.data(), KVSPN_FP32, {kStates, kWidth}); }
    kvspn_status encode(kvspn_encoder* encoder) {
        const kvspn_tensor from = input(), to = output();
        return kvspn_encoder_encode(encoder, &from, &to);
    }
};

// A batch, its buffers, and an utterance that starts over and over.
class Batch {
  public:
    explicit Batch(kvspn_engine* engine) : engine_(engine) {
        const kvspn_batch batch = view();
        CHECK(kvspn_engine_bind(engine, &batch) == KVSPN_OK);
        Noise noise;
        for (float& value : states_) value = noise.next();
    }

    kvspn_batch view() {
        const int64_t head = kWidth / kHeads;
        return {sizeof(kvspn_batch),
                tensor("kv", kv_.data(), KVSPN_FP32, {kLayers, 2, kRows, kHeads, kCapacity, head}),
                tensor("lengths", lengths, KVSPN_INT32, {kRows}),
                tensor("tokens", tokens, KVSPN_INT32, {kRows, kCapacity}),
                tensor("finished", finished, KVSPN_BOOL, {kRows}),
                tensor("stats", stats, KVSPN_INT32, {kRows, 3}),
                tensor("cross_kv", cross_.data(), KVSPN_FP32, {kLayers, 2, kRows, kHeads, kStates, head}),
                tensor("cross_lengths", cross_lengths, KVSPN_INT32, {kRows}),
                nullptr,
                nullptr,
                nullptr};
    }

    kvspn_tensor states() { return tensor("states", states_, KVSPN_FP32, {kStates, kWidth}); }

    void start() {
        CHECK(kvspn_engine_reset(engine_) == KVSPN_OK);
        for (int row = 0; row < kRows; ++row) {
            kvspn_tensor some = states();
            some.shape[0] -= row;
            CHECK(kvspn_engine_encode(engine_, row, &some) == KVSPN_OK);
            for (int n = 0; n <= row; ++n) tokens[row * kCapacity + n] = 1 + n;
            finished[row] = 0;
            CHECK(kvspn_engine_prefill(engine_, row, row) == KVSPN_OK);
        }
    }

    static kvspn_step_params step_params(int draft) {
        return {sizeof(kvspn_step_params), nullptr, 1, -1, kCapacity, draft, nullptr, nullptr, nullptr};
    }

    bool done() const {
        for (uint8_t row : finished)
            if (!row) return false;
        return true;
    }

    // The tokens of a whole generation.
    std::vector<int32_t> generate(int draft) {
        start();
        const kvspn_generate_params params{sizeof params, step_params(draft), nullptr, 0, nullptr, nullptr};
        CHECK(kvspn_engine_generate(engine_, &params) == KVSPN_OK);
        kvspn_statistics all{sizeof all, 0, 0, 0, 0};
        CHECK(kvspn_engine_read_statistics(engine_, -1, &all) == KVSPN_OK);
        CHECK(all.tokens == kRows * (kCapacity - 1) - (kRows - 1) * kRows / 2);
        return answer();
    }

    std::vector<int32_t> answer() const { return {tokens, tokens + kRows * kCapacity}; }

    // What a refused call leaves as it is.
    using State = std::vector<std::vector<int32_t>>;
    State state() const {
        return {answer(),
                {lengths, lengths + kRows},
                {stats, stats + 3 * kRows},
                {cross_lengths, cross_lengths + kRows},
                {finished, finished + kRows}};
    }

    int32_t lengths[kRows] = {}, tokens[kRows * kCapacity] = {}, stats[kRows * 3] = {},
            cross_lengths[kRows] = {};
    uint8_t finished[kRows] = {};

  private:
    kvspn_engine* engine_;
    std::vector<float> kv_ = std::vector<float>(kLayers * 2 * kRows * kWidth * kCapacity);
    std::vector<float> cross_ = std::vector<float>(kLayers * 2 * kRows * kWidth * kStates);
    float states_[kStates * kWidth];
};
