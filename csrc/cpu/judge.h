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

// One of a row's best tokens.
struct Ranked {
    float logit;
    int32_t id;
};

// Of a row's logits the n largest, the largest first, of equals the smaller id; neither NaN nor -inf. Returns
// how many there are.
inline int find_best(const float* logits, int count, int n, Ranked* best) {
    const auto ahead = [](const Ranked& a, const Ranked& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    int found = 0;  // a heap, with the last of them in front
    for (int i = 0; n && i < count; ++i) {
        if (!(logits[i] > (found < n ? -INFINITY : best[0].logit))) continue;
        if (found == n) std::pop_heap(best, best + found--, ahead);
        best[found++] = {logits[i], i};
        std::push_heap(best, best + found, ahead);
    }
    std::sort_heap(best, best + found, ahead);
    return found;
}

struct Judge {
    const Kernels& kernels;
    const float* mask;   // of all tokens; or null
    const int32_t* ids;  // the tokens that the logits are of; null: 0, 1, ...
    const RowRule* rule;
    int32_t index;            // of the row, that the token would have
    Window window;            // where the rule has timestamps: the tokens that may come
    int count;                // of all logits
    float least = -INFINITY;  // What is smaller is not drawn, as it is not among the rule's top_k.

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
                const auto cut = [&](float logit) { return logit < least; };
                if (std::all_of(heard, heard + strip, cut)) continue;
                if (sampled) {
                    kernels.disturb(heard, *rule, index, ids ? ids + first : nullptr, first, strip,
                                    disturbed);
                    for (int i = 0; i < strip; ++i)
                        if (cut(heard[i])) disturbed[i] = -INFINITY;
                }
                const int32_t before = best[kind].id;
                kernels.judge(sampled ? disturbed : heard, nullptr, first, strip, best[kind]);
                if (best[kind].id != before) best[kind].logit = heard[best[kind].id - first];
            }
        }
    }

    // All logits of a row at once, in place: they take its mask and grammar, for good. Lists the n best; for
    // a rule that cuts, n is its top_k, or all. Returns how many there are.
    int rank(float* logits, Partition* parts, int n, Ranked* ranked) {
        if (rule->times) {
            RowRule greedy = *rule;
            greedy.temperature = 0;
            Judge plain = *this;
            plain.rule = &greedy;
            Best ignored[kKinds];
            plain.hear(logits, 0, count, ignored, parts);
            if (forced(parts)) window.text = rule->times;
        }
        for (int i = 0; mask && i < count; ++i) logits[i] += mask[token(i)];
        if (rule->times) constrain(logits, 0, count);
        mask = nullptr;
        const int found = find_best(logits, count, n, ranked);
        if (is_cut(*rule) && found >= rule->top_k) least = ranked[rule->top_k - 1].logit;
        return found;
    }

    // The draft's own logit comes first, so that one reading of the others tells argmax and rank.
    void expect(int32_t draft, float logit, Best* best) const {
        Best own[kKinds];
        Partition parts[kKinds];
        Judge alone = *this;
        alone.count = 1, alone.least = -INFINITY;
        alone.hear(&logit, draft, 1, own, parts);
        const Best& said = own[kind_of(draft)];
        for (int kind = 0; kind < kinds(); ++kind)
            best[kind].draft = draft, best[kind].draft_value = logit < least ? -INFINITY : said.value,
            best[kind].draft_logit = said.logit;
    }

    // Whether all timestamps together are likelier than every token of text.
    bool forced(const Partition* parts) const {
        const int all = strips();
        float text = -INFINITY;
        for (int i = 0; i < all; ++i) text = std::max(text, parts[i].largest);
        return join(parts + all, all) > text;
    }

    // The best of all kinds, from those of each; where timestamps are forced, it is one of them.
    Best decide(const Best* best, const Partition* parts, bool scored) const {
        Best chosen = best[0];
        const int all = strips();
        int first = 0, some = all;
        if (rule->times) {
            const Best& time = best[1];
            if (forced(parts)) {
                chosen = time, first = all;
                if (chosen.draft >= 0 && !kind_of(chosen.draft))
                    chosen.draft_value = chosen.draft_logit = -INFINITY;
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
        if (chosen.draft >= 0 && !(chosen.draft_value > -INFINITY)) chosen.above = count;  // suppressed
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
