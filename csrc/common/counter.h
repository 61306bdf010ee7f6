// Counts in the caller's memory.
#pragma once

#include <cstdint>

namespace kvspn {

// They may hold anything, so the sum wraps.
inline void count(int32_t& total, int32_t more) { total = int32_t(uint32_t(total) + uint32_t(more)); }

}  // namespace kvspn
