// A team of threads that runs one function together, with barriers that cost a microsecond.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>

namespace kvspn {

class Team {
  public:
    // Throws InvalidArgument where the system does not grant so many threads.
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls work(thread) on every thread, the caller being thread 0; work must not throw. In a child process,
    // where a fork leaves only the thread that forked, the first call starts the others again.
    void run(const std::function<void(int)>& work);

    // Every thread of the running team waits for the others.
    void barrier();

  private:
    struct Crew;
    bool abandon();

    const int size_;
    std::unique_ptr<Crew> crew_;
    pid_t process_;  // that the crew's threads are in
};

}  // namespace kvspn
