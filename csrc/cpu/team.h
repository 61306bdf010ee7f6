// A team of threads that runs one function together, with barriers that cost a microsecond.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvspn {

class Team {
  public:
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls work(thread) on every thread, the caller being thread 0; work must not throw.
    void run(const std::function<void(int)>& work);

    // Every thread of the running team waits for the others.
    void barrier();

  private:
    void serve(int thread);

    // Waits while `count` is `old`: spinning, then giving the core to other threads, at last asleep.
    void wait_while(const std::atomic<uint32_t>& count, uint32_t old);
    void advance(std::atomic<uint32_t>& count);

    const int size_;
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

}  // namespace kvspn
