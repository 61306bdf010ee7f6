#include "cpu/team.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common/cores.h"
#include "common/error.h"

namespace kvspn {
namespace {

constexpr int kSpins = 500, kYields = 200;  // some 5 microseconds, and some 50 to 100 more

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

// The other threads, and what they share with the caller.
struct Team::Crew {
    explicit Crew(int size);
    ~Crew() { end(); }

    void run(const std::function<void(int)>& work);
    void barrier();

  private:
    void end();
    void serve(int thread);

    // Waits while `count` is `old`: spinning, then giving the core to other threads, at last asleep.
    void wait_while(const std::atomic<uint32_t>& count, uint32_t old);
    void advance(std::atomic<uint32_t>& count);

    const int size_, spins_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<uint32_t> generation_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

Team::Team(int threads)
    : size_(threads), crew_(threads > 1 ? std::make_unique<Crew>(threads) : nullptr), process_(getpid()) {}

Team::~Team() { abandon(); }

// In a child process the parent's threads are missing, and what they held or waited for stays so: it is left
// as it is, never freed.
bool Team::abandon() {
    const bool forked = process_ != getpid();
    if (forked) static_cast<void>(crew_.release());
    return forked;
}

void Team::run(const std::function<void(int)>& work) {
    if (size_ == 1) return work(0);
    if (abandon()) {
        crew_ = std::make_unique<Crew>(size_);
        process_ = getpid();
    }
    crew_->run(work);
}

void Team::barrier() {
    if (size_ > 1) crew_->barrier();
}

// Threads that share a core are waited for without spinning, which would keep them from arriving.
Team::Crew::Crew(int size) : size_(size), spins_(size > usable_cores() ? 0 : kSpins) {
    try {
        for (int thread = 1; thread < size; ++thread)
            workers_.emplace_back([this, thread] { serve(thread); });
    } catch (const std::exception& error) {
        const size_t started = workers_.size();
        end();
        require(false, "threads must be no more than the system grants, ", started + 1, ", got ", size, ": ",
                error.what());
    }
}

void Team::Crew::end() {
    stop_ = true;
    advance(generation_);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void Team::Crew::run(const std::function<void(int)>& work) {
    work_ = &work;
    advance(generation_);
    work(0);
    barrier();
}

void Team::Crew::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_);
    } else {
        wait_while(phase_, phase);
    }
}

void Team::Crew::serve(int thread) {
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
void Team::Crew::wait_while(const std::atomic<uint32_t>& count, uint32_t old) {
    for (int spin = 0; spin < spins_ + kYields; ++spin) {
        if (count.load(std::memory_order_acquire) != old) return;
        if (spin < spins_)
            pause();
        else
            std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, [&] { return count.load() != old; });
    --sleepers_;
}

void Team::Crew::advance(std::atomic<uint32_t>& count) {
    ++count;
    if (!sleepers_.load()) return;
    {
        std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
}

}  // namespace kvspn
