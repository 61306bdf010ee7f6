// What becomes of a row's drafts: the same function for ops and engines, on every device.
#pragma once

#include <cstdint>

namespace kvspn {

#if defined(__CUDACC__)
#define KVSPN_EVERYWHERE __host__ __device__ __forceinline__
#define KVSPN_INLINE static KVSPN_EVERYWHERE
#else
#define KVSPN_EVERYWHERE inline
// What files of several instruction sets include: the linker must not share one copy.
#define KVSPN_INLINE static inline __attribute__((always_inline))
#endif

// To a count of the caller's, which may be anything: the sum wraps.
KVSPN_EVERYWHERE void add_to(int32_t& total, int32_t more) {
    total = int32_t(uint32_t(total) + uint32_t(more));
}

struct StopRule {
    int32_t k, eos, max_length;
};

// The longest prefix of a row's drafts whose ranks are all under k, then the base model's own choice; the
// first token that ends the row, or max_length, cuts them off. Returns whether the row has ended; lengths
// roll back the rest. A row tells draft(i) and rank(i) for i < drafts, choice(i) of the query i, and takes
// emit(query, token at, token). length: that of the row, which `emit` must not change; it grows here, and so
// do stats [3].
template <class Row>
KVSPN_EVERYWHERE bool accept(const Row& row, int32_t drafts, const StopRule& rule, int32_t& length,
                             int32_t* stats) {
    int32_t drafted = 0;  // up to the first that is no token
    while (drafted < drafts && row.draft(drafted) >= 0) ++drafted;
    int32_t accepted = 0;
    while (accepted < drafted && row.rank(accepted) < rule.k) ++accepted;
    const int64_t count = int64_t(length) + 1;
    int32_t emitted = 0;
    bool ended = false;
    for (; emitted <= accepted && count + emitted < rule.max_length && !ended; ++emitted) {
        const int32_t token = emitted < accepted ? row.draft(emitted) : row.choice(accepted);
        row.emit(emitted, count + emitted, token);
        ended = token == rule.eos || token < 0;
    }
    length = int32_t(count - 1 + emitted);
    add_to(stats[0], 1);
    add_to(stats[1], drafted);
    add_to(stats[2], accepted < emitted ? accepted : emitted);
    return ended || count + emitted >= rule.max_length;
}

}  // namespace kvspn
