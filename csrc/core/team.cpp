#include "core/team.h"

#include <algorithm>

namespace kvspn {
namespace {

constexpr int kMostSpins = 4000, kFewestSpins = 50;  // some 50 microseconds, and about one

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Team(int threads) : size_(threads), spins_(kMostSpins) {
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
        // Where threads share a core, spinning only keeps the others from arriving.
        const int spins = spins_.load(std::memory_order_relaxed);
        const bool slept = wait_while(phase_, phase, spins);
        const int next = slept ? std::max(spins / 2, kFewestSpins) : std::min(spins + spins / 16, kMostSpins);
        if (next != spins) spins_.store(next, std::memory_order_relaxed);  // or the line moves each time
    }
}

void Team::serve(int thread) {
    for (uint32_t seen = 0;; ++seen) {
        wait_while(generation_, seen, kMostSpins);
        if (stop_) return;
        (*work_)(thread);
        barrier();
    }
}

// Either this thread sees the new value before it sleeps, or `advance` sees that it does: both are in the one
// order of sequentially consistent operations.
bool Team::wait_while(const std::atomic<uint32_t>& count, uint32_t old, int spins) {
    for (int spin = 0; spin < spins; ++spin) {
        if (count.load(std::memory_order_acquire) != old) return false;
        pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return count.load() != old; });
    --sleepers_;
    return true;
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
