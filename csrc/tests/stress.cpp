// The C ABI from several threads, and many times over: equal results, no allocation in a step, flat memory.
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "kvspn.h"

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, kvspn_last_error()); \
            std::exit(1);                                                                                \
        }                                                                                                \
    } while (0)

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__) || !defined(__GLIBC__)
#define KVSPN_COUNTS 0  // malloc is the sanitizer's
#else
#define KVSPN_COUNTS 1
#endif

static std::atomic<long> allocations{0};

#if KVSPN_COUNTS
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* data, size_t size);
void* __libc_memalign(size_t align, size_t size);
void* malloc(size_t size) { return ++allocations, __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return ++allocations, __libc_calloc(count, size); }
void* realloc(void* data, size_t size) { return ++allocations, __libc_realloc(data, size); }
void* aligned_alloc(size_t align, size_t size) { return ++allocations, __libc_memalign(align, size); }
}
#endif

namespace {

constexpr int kLayers = 2, kHeads = 2, kWidth = 16, kHidden = 32, kVocabulary = 29, kRows = 3, kCapacity = 24,
              kStates = 5;

// Reproducible numbers in [-0.5, 0.5).
struct Noise {
    uint32_t state = 1;
    float next() {
        state = state * 1664525u + 1013904223u;
        return float(state >> 8) / float(1 << 24) - 0.5f;
    }
};

kvspn_tensor tensor(const char* name, void* data, int32_t dtype, const std::vector<int64_t>& shape) {
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
    }

    kvspn_engine* engine(int threads) const {
        kvspn_engine_params params{sizeof params, kLayers, kHeads, 1, 1, 0, threads};
        kvspn_engine* made = nullptr;
        CHECK(kvspn_engine_create(&params, tensors_.data(), int32_t(tensors_.size()), &made) == KVSPN_OK);
        return made;
    }

  private:
    void add_norm(const std::string& name) {
        add(name + ".weight", {kWidth});
        add(name + ".bias", {kWidth});
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

// A batch, its buffers, and an utterance that starts over and over.
class Batch {
  public:
    explicit Batch(kvspn_engine* engine) : engine_(engine) {
        const int64_t head = kWidth / kHeads;
        kvspn_batch batch{
            sizeof batch,
            tensor("kv", kv_.data(), KVSPN_FP32, {kLayers, 2, kRows, kHeads, kCapacity, head}),
            tensor("lengths", lengths_, KVSPN_INT32, {kRows}),
            tensor("tokens", tokens_, KVSPN_INT32, {kRows, kCapacity}),
            tensor("finished", finished_, KVSPN_BOOL, {kRows}),
            tensor("stats", stats_, KVSPN_INT32, {kRows, 3}),
            tensor("cross_kv", cross_.data(), KVSPN_FP32, {kLayers, 2, kRows, kHeads, kStates, head}),
            tensor("cross_lengths", cross_lengths_, KVSPN_INT32, {kRows}),
            nullptr,
            nullptr};
        CHECK(kvspn_engine_bind(engine, &batch) == KVSPN_OK);
        Noise noise;
        for (float& value : states_) value = noise.next();
    }

    void start() {
        CHECK(kvspn_engine_reset(engine_) == KVSPN_OK);
        for (int row = 0; row < kRows; ++row) {
            kvspn_tensor states = tensor("states", states_, KVSPN_FP32, {kStates - row, kWidth});
            CHECK(kvspn_engine_encode(engine_, row, &states) == KVSPN_OK);
            for (int n = 0; n <= row; ++n) tokens_[row * kCapacity + n] = 1 + n;
            finished_[row] = 0;
            CHECK(kvspn_engine_prefill(engine_, row, row) == KVSPN_OK);
        }
    }

    // The tokens of a whole generation.
    std::vector<int32_t> generate(int draft) {
        start();
        kvspn_generate_params params{sizeof params, {sizeof params.step, nullptr, 1, -1, kCapacity, draft},
                                     nullptr,       0,
                                     nullptr,       nullptr};
        CHECK(kvspn_engine_generate(engine_, &params) == KVSPN_OK);
        kvspn_statistics all{sizeof all, 0, 0, 0, 0};
        CHECK(kvspn_engine_read_statistics(engine_, -1, &all) == KVSPN_OK);
        CHECK(all.tokens == kRows * (kCapacity - 1) - (kRows - 1) * kRows / 2);
        return {tokens_, tokens_ + kRows * kCapacity};
    }

    // Allocations in the steps of one generation.
    long allocations_of_steps() {
        start();
        kvspn_step_params params{sizeof params, nullptr, 1, -1, kCapacity, 1};
        const long before = allocations;
        while (!(finished_[0] && finished_[1] && finished_[2]))
            CHECK(kvspn_engine_step(engine_, &params) == KVSPN_OK);
        return allocations - before;
    }

  private:
    kvspn_engine* engine_;
    std::vector<float> kv_ = std::vector<float>(kLayers * 2 * kRows * kWidth * kCapacity);
    std::vector<float> cross_ = std::vector<float>(kLayers * 2 * kRows * kWidth * kStates);
    float states_[kStates * kWidth];
    int32_t lengths_[kRows] = {}, tokens_[kRows * kCapacity] = {}, stats_[kRows * 3] = {},
            cross_lengths_[kRows] = {};
    uint8_t finished_[kRows] = {};
};

long resident_pages() {
    long size = 0, resident = 0;
    std::FILE* file = std::fopen("/proc/self/statm", "r");
    CHECK(file && std::fscanf(file, "%ld %ld", &size, &resident) == 2);
    std::fclose(file);
    return resident;
}

}  // namespace

// stress GENERATIONS: engines of 1 to 4 threads at the same time, then that many generations on one of them.
int main(int argc, char** argv) {
    const int generations = argc > 1 ? std::atoi(argv[1]) : 10000;
    const Model model;
    std::vector<int32_t> expected;
    {
        kvspn_engine* engine = model.engine(1);
        expected = Batch(engine).generate(0);
        kvspn_engine_destroy(engine);
    }
    std::vector<std::thread> callers;
    for (int threads = 1; threads <= 4; ++threads) {
        callers.emplace_back([&, threads] {
            for (int n = 0; n < 3; ++n) {
                kvspn_engine* engine = model.engine(threads);
                Batch batch(engine);
                for (int again = 0; again < 4; ++again) CHECK(batch.generate(again % 2) == expected);
                kvspn_engine_destroy(engine);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();

    kvspn_engine* engine = model.engine(1);
    Batch batch(engine);
    if (KVSPN_COUNTS) {
        const long before = allocations;
        batch.start();
        CHECK(allocations > before);  // the count counts
        CHECK(batch.allocations_of_steps() == 0);
    }
    for (int n = 0; n < generations / 10; ++n) batch.generate(1);
    const long before = resident_pages();
    for (int n = 0; n < generations; ++n) batch.generate(1);
    const long grown = (resident_pages() - before) * (sysconf(_SC_PAGESIZE) / 1024);
    std::printf("%d generations: resident memory grew by %ld KiB; allocations counted: %s\n", generations,
                grown, KVSPN_COUNTS ? "yes" : "no");
    if (KVSPN_COUNTS) CHECK(grown <= 256);  // a sanitizer keeps what is freed
    kvspn_engine_destroy(engine);
}
