#include "cpu/team.h"

namespace kvspn {
namespace {

constexpr int kSpins = 500, kYields = 200;  // some 5 microseconds, and some 50 to 100 more

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Team(int threads) : size_(threads) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
    stop_ = true;
    advance(generation_);
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(int)>& work) {
    work_ = &work;
    if (size_ > 1) advance(generation_);
    work(0);
    barrier();
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_);
    } else {
        wait_while(phase_, phase);
    }
}

void Team::serve(int thread) {
    for (uint32_t seen = 0;; ++seen) {
        wait_while(generation_, seen);
        if (stop_) return;
        (*work_)(thread);
        barrier();
    }
}

// Either this thread sees the new value before it sleeps, or `advance` sees that it does: both are in the one
// order of sequentially consistent operations.
//
// Where threads share a core, as beside other busy programs, spinning only keeps the others from arriving: a
// thread that yields makes room for them, and is back at once where there are none. Asleep, it would be back
// some 50 microseconds after the last one has arrived.
void Team::wait_while(const std::atomic<uint32_t>& count, uint32_t old) {
    for (int spin = 0; spin < kSpins + kYields; ++spin) {
        if (count.load(std::memory_order_acquire) != old) return;
        if (spin < kSpins)
            pause();
        else
            std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return count.load() != old; });
    --sleepers_;
}

void Team::advance(std::atomic<uint32_t>& count) {
    ++count;
    if (!sleepers_.load()) return;
    {
        std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
}

}  // namespace kvspn
