// Logits held against a row's rule, strip by strip.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"

namespace kvspn::cpu {

constexpr int kStrip = 64;  // logits that exist at a time, on each thread
constexpr int kKinds = 2;   // of tokens under a grammar of timestamps: text, and they; else all are text

// The log-sum-exp of the logits of all strips.
inline float join(const Partition* parts, int count) {
    float largest = -INFINITY;
    for (int i = 0; i < count; ++i) largest = std::max(largest, parts[i].largest);
    double total = 0;
    for (int i = 0; i < count; ++i)
        if (parts[i].sum > 0) total += double(parts[i].sum) * std::exp(double(parts[i].largest - largest));
    return float(double(largest) + std::log(total));
}

struct Judge {
    const Kernels& kernels;
    const float* mask;   // of all tokens; or null
    const int32_t* ids;  // the tokens that the logits are of; null: 0, 1, ...
    const RowRule* rule;
    int32_t index;  // of the row, that the token would have
    Window window;  // where the rule has timestamps: the tokens that may come
    int count;      // of all logits

    int strips() const { return (count + kStrip - 1) / kStrip; }
    int kinds() const { return rule->times ? kKinds : 1; }
    int32_t token(int i) const { return ids ? ids[i] : i; }

    // Logits, of which `first` is the first, join the row's best of each kind. parts: of each kind those of
    // their strips, `strips()` from kind to kind, where they are asked for, as under a grammar they always
    // are.
    void hear(const float* logits, int first, int some, Best* best, Partition* parts) const {
        const bool sampled = rule->temperature > 0;
        if (!sampled && !parts && !(ids && mask))
            return kernels.judge(logits, mask ? mask + first : nullptr, first, some, *best);
        const int all = strips();
        float masked[kStrip], own[kStrip], disturbed[kStrip];
        for (int last = first + some; first < last;
             first += kStrip, logits += kStrip, parts += parts != nullptr) {
            const int strip = std::min(kStrip, last - first);
            for (int i = 0; i < strip; ++i) masked[i] = mask ? logits[i] + mask[token(first + i)] : logits[i];
            const int times = rule->times ? constrain(masked, first, strip) : 0;
            for (int kind = 0; kind < kinds(); ++kind) {
                const float* heard = masked;
                Partition* part = parts ? parts + int64_t(kind) * all : nullptr;
                if (times && times < strip) {  // a strip of both
                    for (int i = 0; i < strip; ++i)
                        own[i] = (token(first + i) >= rule->times) == kind ? masked[i] : -INFINITY;
                    heard = own;
                } else if ((times > 0) != (kind > 0)) {
                    *part = {-INFINITY, 0};
                    continue;
                }
                if (part) *part = kernels.partition(heard, strip);
                if (sampled)
                    kernels.disturb(heard, *rule, index, ids ? ids + first : nullptr, first, strip,
                                    disturbed);
                const int32_t before = best[kind].id;
                kernels.judge(sampled ? disturbed : heard, nullptr, first, strip, best[kind]);
                if (best[kind].id != before) best[kind].logit = heard[best[kind].id - first];
            }
        }
    }

    // The draft's own logit comes first, so that one reading of the others tells argmax and rank.
    void expect(int32_t draft, float logit, Best* best) const {
        Best own[kKinds];
        Partition parts[kKinds];
        Judge alone = *this;
        alone.count = 1;
        alone.hear(&logit, draft, 1, own, parts);
        const Best& said = own[kind_of(draft)];
        for (int kind = 0; kind < kinds(); ++kind)
            best[kind].draft = draft, best[kind].draft_value = said.value,
            best[kind].draft_logit = said.logit;
    }

    // The best of all kinds, from those of each. Where all timestamps together are likelier than every token
    // of text, it is one of them, and no text.
    Best decide(const Best* best, const Partition* parts, bool scored) const {
        Best chosen = best[0];
        const int all = strips();
        int first = 0, some = all;
        if (rule->times) {
            const Best& time = best[1];
            float text = -INFINITY;
            for (int i = 0; i < all; ++i) text = std::max(text, parts[i].largest);
            if (join(parts + all, all) > text) {
                chosen = time, first = all;
                if (chosen.draft >= 0 && !kind_of(chosen.draft)) chosen.draft_value = -INFINITY;
            } else {
                some = kKinds * all;
                chosen.above += time.above;
                const bool better =
                    time.value > chosen.value || (time.value == chosen.value && time.id < chosen.id);
                if (time.id >= 0 && better)
                    chosen.value = time.value, chosen.id = time.id, chosen.logit = time.logit;
            }
            if (best[0].nan || time.nan) chosen.nan = true;
        }
        if (chosen.nan) chosen.id = -1;
        if (chosen.draft >= 0 && !(chosen.draft_value > -INFINITY))  // It is suppressed.
            chosen.above = count, chosen.draft_logit = -INFINITY;
        if (scored) chosen.log_sum_exp = join(parts + first, some);
        return chosen;
    }

  private:
    // Adds -inf to what the grammar forbids; returns how many of the strip are timestamps.
    int constrain(float* masked, int first, int strip) const {
        int times = 0;
        for (int i = 0; i < strip; ++i) {
            const int32_t each = token(first + i);
            times += each >= rule->times;
            masked[i] += allows(*rule, window, each) ? 0.f : -INFINITY;
        }
        return times;
    }
    int kind_of(int32_t draft) const { return rule->times && token(draft) >= rule->times; }
};

}  // namespace kvspn::cpu
