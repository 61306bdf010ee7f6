// The C ABI from several threads, and many times over: equal results, no allocation in a step, flat memory.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "model.h"

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

// Allocations in the steps of one generation.
long allocations_of_steps(kvspn_engine* engine, Batch& batch) {
    batch.start();
    const kvspn_step_params params = Batch::step_params(1);
    const long before = allocations;
    while (!batch.done()) CHECK(kvspn_engine_step(engine, &params) == KVSPN_OK);
    return allocations - before;
}

// Threads that share one engine: a call is made or refused, and the tokens are those of one thread.
void share(const Model& model, const std::vector<int32_t>& expected) {
    kvspn_engine* engine = model.engine(2);
    Batch batch(engine);
    batch.start();
    std::atomic<int> refused{0};
    std::vector<std::thread> callers;
    for (int n = 0; n < 3; ++n) {
        callers.emplace_back([&] {
            const kvspn_step_params params = Batch::step_params(1);
            int32_t count = 0;
            kvspn_statistics all{sizeof all, 0, 0, 0, 0};
            for (int call = 0; call < 200; ++call) {
                for (const kvspn_status status : {kvspn_engine_step(engine, &params),
                                                  kvspn_engine_progress(engine, 0, nullptr, 0, &count),
                                                  kvspn_engine_read_statistics(engine, -1, &all)}) {
                    CHECK(status == KVSPN_OK || status == KVSPN_BUSY);
                    refused += status == KVSPN_BUSY;
                }
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    // A thread that is put off in the middle of a call may have had all other calls refused.
    const kvspn_step_params params = Batch::step_params(1);
    while (!batch.done()) CHECK(kvspn_engine_step(engine, &params) == KVSPN_OK);
    CHECK(batch.answer() == expected);
    std::printf("3 threads on one engine: %d of 1800 calls refused\n", refused.load());

    // on_step stands between two steps: it may call the engine, and what it may not do is refused.
    batch.start();
    const kvspn_generate_params generate{
        sizeof generate,
        Batch::step_params(1),
        nullptr,
        0,
        [](void* context) -> int32_t {
            int32_t count = 0;
            auto* made = static_cast<kvspn_engine*>(context);
            CHECK(kvspn_engine_progress(made, 0, nullptr, 0, &count) == KVSPN_OK);
            return 0;
        },
        engine};
    CHECK(kvspn_engine_generate(engine, &generate) == KVSPN_OK);
    CHECK(batch.answer() == expected);
    kvspn_engine_destroy(engine);
}

// Encoders of 1 to 4 threads at the same time, and one that three threads share, where a call is made or
// refused: the states are those of one thread.
void encode(const Model& model) {
    for (const int32_t format : {KVSPN_FP32, KVSPN_BF16, KVSPN_INT8}) {
        kvspn_encoder* alone = model.encoder(format, 1);
        Sound expected;
        CHECK(expected.encode(alone) == KVSPN_OK);
        std::vector<std::thread> callers;
        for (int threads = 1; threads <= 4; ++threads) {
            callers.emplace_back([&, threads] {
                kvspn_encoder* own = model.encoder(format, threads);
                for (int again = 0; again < 20; ++again) {
                    Sound sound;
                    CHECK(sound.encode(own) == KVSPN_OK && sound.states == expected.states);
                    const kvspn_status status = sound.encode(alone);
                    CHECK(status == KVSPN_BUSY || (status == KVSPN_OK && sound.states == expected.states));
                }
                kvspn_encoder_destroy(own);
            });
        }
        for (std::thread& caller : callers) caller.join();
        kvspn_encoder_destroy(alone);
    }
}

#if !defined(__SANITIZE_THREAD__)
// A child process goes on with the engine that it has a copy of, or only ends; so does the parent.
void fork_and_go_on(const Model& model, const std::vector<int32_t>& expected) {
    for (int threads : {1, 3}) {
        kvspn_engine* engine = model.engine(threads);
        Batch batch(engine);
        CHECK(batch.generate(1) == expected);
        for (bool use : {true, false}) {
            std::fflush(stdout);
            const pid_t child = fork();
            CHECK(child >= 0);
            if (!child) {
                alarm(60);  // a child that hangs ends with a signal
                if (use) CHECK(batch.generate(1) == expected && batch.generate(0) == expected);
                kvspn_engine_destroy(engine);
                _exit(0);
            }
            int status = 0;
            CHECK(waitpid(child, &status, 0) == child && status == 0);
        }
        CHECK(batch.generate(0) == expected);
        kvspn_engine_destroy(engine);
    }
}
#endif

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
    share(model, expected);
    encode(model);
#if !defined(__SANITIZE_THREAD__)  // which cannot follow a child's threads
    fork_and_go_on(model, expected);
#endif

    kvspn_engine* engine = model.engine(1);
    Batch batch(engine);
    if (KVSPN_COUNTS) {
        const long before = allocations;
        batch.start();
        CHECK(allocations > before);  // the count counts
        CHECK(allocations_of_steps(engine, batch) == 0);
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
