// Logits held against a row's rule, strip by strip.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"

namespace kvspn::cpu {

constexpr int kStrip = 64;  // logits that exist at a time, on each thread

struct Judge {
    const Kernels& kernels;
    const float* mask;   // of all tokens; or null
    const int32_t* ids;  // the tokens that the logits are of; null: 0, 1, ...
    const RowRule* rule;
    int32_t index;  // of the row, that the token would have

    // Logits, of which `first` is the first, join the row's best. parts: those of their strips, where they
    // are asked for.
    void hear(const float* logits, int first, int count, Best& best, Partition* parts) const {
        const bool sampled = rule->temperature > 0;
        if (!sampled && !parts && !(ids && mask))
            return kernels.judge(logits, mask ? mask + first : nullptr, first, count, best);
        float masked[kStrip], disturbed[kStrip];
        for (int last = first + count; first < last; first += kStrip, logits += kStrip) {
            count = std::min(kStrip, last - first);
            for (int i = 0; i < count; ++i)
                masked[i] = mask ? logits[i] + mask[ids ? ids[first + i] : first + i] : logits[i];
            if (parts) *parts++ = kernels.partition(masked, count);
            if (sampled)
                kernels.disturb(masked, *rule, index, ids ? ids + first : nullptr, first, count, disturbed);
            const int32_t before = best.id;
            kernels.judge(sampled ? disturbed : masked, nullptr, first, count, best);
            if (best.id != before) best.logit = masked[best.id - first];
        }
    }

    // The draft's own logit comes first, so that one reading of the others tells argmax and rank.
    void expect(int32_t draft, const float& logit, Best& best) const {
        Best own;
        Partition part;
        hear(&logit, draft, 1, own, &part);
        best.draft = draft, best.draft_value = own.value, best.draft_logit = own.logit;
    }
};

// The log-sum-exp of the logits of all strips.
inline float join(const Partition* parts, int count) {
    float largest = -INFINITY;
    for (int i = 0; i < count; ++i) largest = std::max(largest, parts[i].largest);
    double total = 0;
    for (int i = 0; i < count; ++i)
        if (parts[i].sum > 0) total += double(parts[i].sum) * std::exp(double(parts[i].largest - largest));
    return float(double(largest) + std::log(total));
}

}  // namespace kvspn::cpu
