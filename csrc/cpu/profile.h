// The stages of a step that is profiled: each is what ran since the one before.
#pragma once

#include <chrono>
#include <cstdint>

#include "common/matrix.h"
#include "kvspn.h"

namespace kvspn {

// Of weights, scales and bias, as a reading of all outputs takes them.
inline int64_t bytes_of(const Matrix& m) {
    const int bits = m.dtype == Dtype::fp32   ? 32
                     : m.dtype == Dtype::int8 ? 8
                     : m.dtype == Dtype::int4 ? 4
                                              : 16;
    const int64_t floats = (m.scale ? (m.columns + m.span - 1) / m.span : 0) + (m.bias ? 1 : 0);
    return m.outputs * (int64_t(m.columns) * bits / 8 + floats * int64_t(sizeof(float)));
}

class Stages {
  public:
    Stages(kvspn_stage* stages, int capacity) : stages_(stages), capacity_(capacity) {}

    // Ends a stage now; only the team's first thread calls it, behind a barrier.
    void note(const char* name, int64_t bytes) {
        const auto now = Clock::now();
        if (count_ < capacity_) {
            const auto taken = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_);
            stages_[count_] = {name, taken.count(), bytes};
        }
        ++count_;
        last_ = Clock::now();
    }

    // All of them, those past the capacity too.
    int count() const { return count_; }

  private:
    using Clock = std::chrono::steady_clock;

    kvspn_stage* stages_;
    int capacity_, count_ = 0;
    Clock::time_point last_ = Clock::now();
};

}  // namespace kvspn
