#include "core/team.h"

namespace kvspn {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds, then the core is left to others

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Spins while `value` is `old`, yielding the core after a while.
void wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; value.load(std::memory_order_acquire) == old; ++spin) {
        if (spin < kSpins)
            pause();
        else
            std::this_thread::yield();
    }
}

}  // namespace

Team::Team(int threads) : size_(threads) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        ++generation_;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(int)>& work) {
    work_ = &work;
    if (size_ > 1) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ++generation_;
        }
        wake_.notify_all();
    }
    work(0);
    barrier();
}

void Team::barrier() {
    if (size_ == 1) return;
    uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
    } else {
        wait_while(phase_, phase);
    }
}

void Team::serve(int thread) {
    uint32_t seen = 0;
    for (;;) {
        for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin)
            pause();
        if (generation_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        }
        ++seen;
        if (stop_) return;
        (*work_)(thread);
        barrier();
    }
}

}  // namespace kvspn
