// Work cut into parts, one for each thread.
#pragma once

#include <algorithm>
#include <utility>

#include "common/error.h"
#include "cpu/kernels.h"
#include "kvspn.h"

namespace kvspn {

// The part of [0, count) that is a thread's, in whole tiles.
inline std::pair<int, int> share(int count, int thread, int threads, int unit = kLanes) {
    const int64_t tiles = (count + unit - 1) / unit;
    return {int(std::min<int64_t>(count, tiles * thread / threads * unit)),
            int(std::min<int64_t>(count, tiles * (thread + 1) / threads * unit))};
}

inline void check_stream(const kvspn_stream* stream) {
    require(!stream || !stream->handle, "stream.handle must be a null pointer on the CPU, got one");
}

// An op's parts, on the threads of its caller.
class Parts {
  public:
    // As many as the caller has threads, but not more than there are `tasks`.
    Parts(const kvspn_stream* stream, int64_t tasks) : stream_(stream) {
        check_stream(stream);
        if (!stream || !stream->run) return;
        require(stream->threads >= 1, "stream.threads must be at least 1, got ", stream->threads);
        count_ = int(std::clamp<int64_t>(tasks, 1, stream->threads));
    }

    int count() const { return count_; }

    // Calls work(part) for every part and waits for all; work must not throw.
    template <class Work>
    void run(const Work& work) const {
        if (count_ == 1) return work(0);
        const auto call = [](void* argument, int32_t part) { (*static_cast<const Work*>(argument))(part); };
        stream_->run(stream_->context, count_, call, const_cast<Work*>(&work));
    }

  private:
    const kvspn_stream* stream_;
    int count_ = 1;
};

}  // namespace kvspn
