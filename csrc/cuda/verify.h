// The logits of rows, reduced to the best of each and the number of those in front of the row's draft.
//
// A judge tells what they are held against: mask(output, row), which is added and loaded ahead; draft(row),
// or -1; and where the result joins those of other blocks: best(row), above(row). Where it is ruled(), also
// the rule(row), the index(row) of the token to choose, the row's text(row, index) before it with the drafts
// drafted(row, i) of its queries in front, and the token(output). Where it is parted(), part(block, kind,
// row) for what a block has heard; where it is scored(), draft_logit(row) for the draft's own logit, and
// score(row), where the log-sum-exp goes and the logit of the choice; and kept(row) for all its masked logits
// in memory, or null. Where it is kListed, listed() tokens are told with their logits, list(row, i, n,
// logit).
#pragma once

#include "cuda/project.h"

namespace kvspn::cuda {

// Of some of a row's logits: the largest, and the sum of exponentials over it; and of what they count as
// under the row's rule the largest, with its logit. The last two of text are those of all tokens.
struct Heard {
    float largest, sum, top, logit;
};

// Where a block's threads meet over a row's kept logits.
struct Meeting {
    int32_t counts[16];
    uint64_t best[2];
    int32_t first, above;  // first: what is below is text that is not among them
};

// A block's part of the result, and the rows of a tile with their drafts and rules.
struct Tally {
    uint64_t best[kKinds][kThreads / 32][kTile];
    int32_t above[kKinds][kThreads / 32][kTile];
    Heard heard[kKinds][kThreads / 32][kTile];
    float draft_logit[kTile];  // what it counts as
    int32_t draft[kTile];      // -1: none, or a suppressed one
    RowRule rule[kTile];
    Window window[kTile];
    int32_t index[kTile];
    float* kept[kTile];
    Meeting meeting;
};

// Order-preserving: a larger logit is a larger number.
__device__ __forceinline__ uint32_t order_of(float logit) {
    const uint32_t bits = as_bits(logit + 0.f);  // -0 becomes 0
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
// A larger logit, then a smaller id, is a larger key. 0: none yet.
__device__ __forceinline__ uint64_t key_of(float logit, int id) {
    return uint64_t(order_of(logit)) << 32 | (0xffffffff - uint32_t(id));
}
// -1 where the largest key is that of NaN, which is above all others, or of -inf.
__device__ __forceinline__ int id_of(uint64_t key) {
    const bool chosen = key <= key_of(INFINITY, 0) && key > key_of(-INFINITY, 0);
    return chosen ? int(0xffffffff - uint32_t(key)) : -1;
}

__device__ __forceinline__ float add_mask(float logit, float mask) {
    logit += mask;
    return logit == logit ? logit + 0.f : NAN;
}

// -inf is added to what a row's grammar forbids.
__device__ __forceinline__ float constrain(const Tally& tally, int row, float logit, int token) {
    const RowRule& rule = tally.rule[row];
    return rule.times && !allows(rule, tally.window[row], token) ? add_mask(logit, -INFINITY) : logit;
}

// Sums of exponentials, in the order of the calls.
__device__ __forceinline__ void join(float& largest, float& sum, float other_largest, float other_sum) {
    if (other_sum == 0) return;
    const float top = fmaxf(largest, other_largest);
    sum = (sum == 0 ? 0 : sum * expf(largest - top)) + other_sum * expf(other_largest - top);
    largest = top;
}

// Whether an output goes ahead of a draft, which counts as `own`.
__device__ __forceinline__ bool leads(float counted, int n, float own, int draft) {
    return draft >= 0 && (counted > own || (counted == own && n < draft));
}

// What a logit counts as in a draw.
__device__ __forceinline__ float disturb(const RowRule& rule, int index, float logit, int token) {
    const float number = uniform(rule.seed[0], rule.seed[1], uint32_t(index), uint32_t(token));
    return logit / rule.temperature - logf(-logf(number));
}

// What a logit of output n counts as under the row's rule, until the draw of a row that is cut; `keeps`: it
// joins what the warp has heard. Not inlined: the loop over the vocabulary, for which this is the exception,
// has no register to spare.
static __device__ __attribute__((noinline)) float hear(Tally& tally, int row, float logit, int n, int token,
                                                       bool keeps) {
    const RowRule& rule = tally.rule[row];
    logit = constrain(tally, row, logit, token);
    float counted = logit;
    if (rule.temperature > 0 && !is_cut(rule)) counted = disturb(rule, tally.index[row], logit, token);
    if (!keeps) return counted;
    if (float* kept = tally.kept[row]) kept[n] = logit;
    const bool time = rule.times && token >= rule.times;
    Heard& heard = tally.heard[time][warp()][row];
    if (logit > heard.largest) {
        heard.sum = heard.sum * expf(heard.largest - logit) + 1;
        heard.largest = logit;
    } else if (logit > -INFINITY) {
        heard.sum += expf(logit - heard.largest);
    }
    for (int kind = 0; kind <= int(time); ++kind) {
        Heard& all = tally.heard[kind][warp()][row];
        if (counted > all.top) all.top = counted, all.logit = logit;
    }
    if (time) {
        const uint64_t key = key_of(counted, n);
        uint64_t& best = tally.best[1][warp()][row];
        best = key > best ? key : best;
        tally.above[1][warp()][row] += leads(counted, n, tally.draft_logit[row], tally.draft[row]);
    }
    return counted;
}

// The row's rule and the window of the token to choose, by a warp: the text so far is the row's own tokens
// and its drafts in front. Not inlined, as hear(); what comes by value need not be in memory, and what a
// judge has beside its Rules stays out.
template <class Rules>
__device__ __attribute__((noinline)) void open_row(const Rules judge, int r, Tally& tally, int row) {
    const RowRule rule = judge.rule(r);
    const int index = judge.index(r), drafts = judge.query(r), begin = max(rule.first - rule.prefix, 0);
    History history;
    if (rule.times) {
        const int end = index - drafts;
        int time = -1;
        for (int at = begin + lane(); at < end; at += 32) {
            const int token = judge.text(r, at);
            if (token >= rule.times) time = max(time, token);
        }
        for (int mask = 16; mask > 0; mask /= 2) time = max(time, from_lane(time, lane() ^ mask));
        history = {max(end - begin, 0), end > begin ? judge.text(r, end - 1) : -1,
                   end - 1 > begin ? judge.text(r, end - 2) : -1, time};
        for (int i = 0; i < drafts; ++i) push(history, judge.drafted(r, i), rule);
    }
    if (lane() == 0) {
        tally.rule[row] = rule, tally.index[row] = index;
        tally.window[row] = window_of(rule, history);
    }
    sync_warp();
}

// What all blocks have heard of a row, by a warp, in one order for every number of rows. Where all timestamps
// together are likelier than every token of text, the row's best is that of the timestamps, and a draft that
// is text is suppressed. Returns the first token that may be chosen.
template <class Rules>
__device__ __attribute__((noinline)) int settle(const Rules judge, int r, int blocks, int vocabulary) {
    const int times = judge.ruled() ? judge.rule(r).times : 0;
    const uint64_t best = fresh(judge.best(r));
    uint64_t time_best = 0;
    float largest[kKinds] = {-INFINITY, -INFINITY}, sum[kKinds] = {}, logit[kKinds] = {-INFINITY, -INFINITY};
    int above = 0;
    for (int i = lane(); i < blocks; i += 32) {
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) {
            if (kind && !times) continue;
            const Part* part = judge.part(i, kind, r);
            join(largest[kind], sum[kind], fresh(&part->largest), fresh(&part->sum));
            const uint64_t own = fresh(&part->best);
            if (kind == 0) {
                if (own == best) logit[0] = fresh(&part->logit);
            } else {
                if (own > time_best) time_best = own, logit[1] = fresh(&part->logit);
                above += fresh(&part->above);
            }
        }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const int other = lane() ^ mask;
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) {
            const float other_largest = from_lane(largest[kind], other),
                        other_sum = from_lane(sum[kind], other);
            const float most = fmaxf(largest[kind], other_largest);
            const float mine = sum[kind] == 0 ? 0 : sum[kind] * expf(largest[kind] - most);
            const float theirs = other_sum == 0 ? 0 : other_sum * expf(other_largest - most);
            sum[kind] = mine + theirs, largest[kind] = most;
        }
        logit[0] = fmaxf(logit[0], from_lane(logit[0], other));
        const uint64_t key = uint64_t(uint32_t(from_lane(int(time_best >> 32), other))) << 32 |
                             uint32_t(from_lane(int(uint32_t(time_best)), other));
        const float its_logit = from_lane(logit[1], other);
        if (key > time_best) time_best = key, logit[1] = its_logit;
        above += from_lane(above, other);
    }
    const bool numbers = id_of(best) >= 0;
    if (times && numbers && largest[1] + logf(sum[1]) > largest[0]) {
        if (lane() == 0) {
            const int draft = judge.draft(r);
            const bool stands =
                draft >= 0 && judge.token(draft) >= times && fresh(judge.above(r)) < vocabulary;
            *judge.best(r) = time_best;
            if (draft >= 0) *judge.above(r) = stands ? above : vocabulary;
            if (judge.scored() && draft >= 0 && !stands) *judge.draft_logit(r) = -INFINITY;
            if (judge.scored()) judge.score(r)[0] = largest[1] + logf(sum[1]), judge.score(r)[1] = logit[1];
        }
        return times;
    }
    join(largest[0], sum[0], largest[1], sum[1]);
    if (judge.scored() && lane() == 0)
        judge.score(r)[0] = largest[0] + logf(sum[0]), judge.score(r)[1] = logit[0];
    return 0;
}

// A row's masked logits, which are kept, of `outputs`; text that may not be chosen counts as -inf.
template <class Rules>
struct Kept {
    const Rules& judge;
    const float* logits;
    int outputs, first;
    __device__ __forceinline__ float operator[](int n) const {
        return judge.token(n) < first ? -INFINITY : fresh(logits + n);
    }
};

// The order of the k-th largest, by the block, a digit of it at a time; 0 where there are fewer.
template <class Rules>
__device__ __forceinline__ uint32_t find_least(const Kept<Rules>& kept, int k, Meeting& meeting) {
    constexpr int kBits = 4, kDigits = 1 << kBits;
    uint32_t least = 0;
    for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
        int counts[kDigits] = {};  // of those that are no smaller than with this digit
        for (int n = thread_index(); n < kept.outputs; n += thread_count()) {
            const uint32_t order = order_of(kept[n]);
#pragma unroll
            for (int digit = 1; digit < kDigits; ++digit)
                counts[digit] += order >= least + (uint32_t(digit) << shift);
        }
        if (thread_index() < kDigits) meeting.counts[thread_index()] = 0;
        sync_block();
#pragma unroll
        for (int digit = 1; digit < kDigits; ++digit) {
            int count = counts[digit];
            for (int mask = 16; mask > 0; mask /= 2) count += from_lane(count, lane() ^ mask);
            if (lane() == 0) atomic_add(&meeting.counts[digit], count);
        }
        sync_block();
        int digit = kDigits - 1;
        while (digit && meeting.counts[digit] < k) --digit;
        least += uint32_t(digit) << shift;
        sync_block();
    }
    return least;
}

// The draw of a row that is cut, by the block: among what is no smaller than its top_k-th largest logit.
template <class Rules>
__device__ __forceinline__ void draw(const Rules& judge, int r, const Kept<Rules>& kept, Meeting& meeting) {
    const RowRule rule = judge.rule(r);
    const int index = judge.index(r), draft = judge.draft(r);
    const uint32_t least = find_least(kept, rule.top_k, meeting);
    const auto counted = [&](int n) {
        const float logit = kept[n];
        return order_of(logit) < least ? -INFINITY : disturb(rule, index, logit, judge.token(n));
    };
    const float own = draft < 0 ? -INFINITY : counted(draft);
    const bool stands = own > -INFINITY;
    uint64_t best = 0;
    int above = 0;
    for (int n = thread_index(); n < kept.outputs; n += thread_count()) {
        const float value = counted(n);
        best = max(best, key_of(value, n));
        above += leads(value, n, own, stands ? draft : -1);
    }
    if (thread_index() == 0) meeting.best[0] = 0, meeting.above = 0;
    sync_block();
    atomic_max(&meeting.best[0], best);
    if (above) atomic_add(&meeting.above, above);
    sync_block();
    if (thread_index()) return;
    *judge.best(r) = meeting.best[0];
    if (draft >= 0) *judge.above(r) = stands ? meeting.above : kept.outputs;
    if (judge.scored()) judge.score(r)[1] = kept[id_of(meeting.best[0])];
}

// The n best of a row, by the block, one after the other.
template <class Rules>
__device__ __forceinline__ void list(const Rules& judge, int r, bool numbers, const Kept<Rules>& kept,
                                     Meeting& meeting) {
    uint64_t last = ~uint64_t(0);
    for (int i = 0; i < judge.listed(); ++i) {
        uint64_t best = 0;
        for (int n = thread_index(); n < kept.outputs; n += thread_count()) {
            const uint64_t key = key_of(kept[n], n);
            if (key < last && key > best) best = key;
        }
        uint64_t& meant = meeting.best[i % 2];
        if (thread_index() == 0) meant = 0;
        sync_block();
        atomic_max(&meant, best);
        sync_block();
        last = meant;
        const int id = numbers ? id_of(last) : -1;
        if (thread_index() == 0) judge.list(r, i, id, id < 0 ? -INFINITY : kept[id]);
    }
}

// A row whose logits are kept, by the block.
template <class Rules>
__device__ __attribute__((noinline)) void settle_kept(const Rules judge, int r, int blocks, int outputs,
                                                      Meeting& meeting) {
    if (warp() == 0) {
        const int first = settle(judge, r, blocks, outputs);
        if (lane() == 0) meeting.first = first;
    }
    sync_block();
    const Kept<Rules> kept{judge, judge.kept(r), outputs, meeting.first};
    const bool numbers = id_of(fresh(judge.best(r))) >= 0;
    sync_block();
    if (numbers && is_cut(judge.rule(r))) draw(judge, r, kept, meeting);
    if constexpr (Rules::kListed) list(judge, r, numbers, kept, meeting);
    sync_block();
}

// Rows `first` to `last`, where what the blocks have heard of their `outputs` decides: a warp each, or the
// block; which waits.
template <class Rules>
__device__ __forceinline__ void settle_rows(const Rules& judge, int first, int last, int blocks, int outputs,
                                            Meeting& meeting) {
    if (!judge.parted()) return;
    for (int r = first + warp(); r < last; r += warps())
        if (!judge.kept(r)) settle(judge, r, blocks, outputs);
    for (int r = first; r < last; ++r)
        if (judge.kept(r)) settle_kept(judge, r, blocks, outputs, meeting);
    sync_block();
}

template <class W, int R, bool kAligned, class Source, class Judge>
__device__ __forceinline__ void verify(const Stage& s, const Source& source, const Judge& judge, int rows,
                                       Tally& tally, float* memory, int shared_floats) {
    const float* x = memory + kMoments;
    const bool ruled = judge.ruled(), parted = judge.parted();
    uint64_t best = 0;
    int above = 0, tile_first = 0, tile_rows = 0;
    auto finish = [&] {  // the block's result of a tile joins those of the others
        if (!tile_rows) return;
        if (lane() % (32 / R) == 0) {
            tally.best[0][warp()][lane() / (32 / R)] = best;
            tally.above[0][warp()][lane() / (32 / R)] = above;
        }
        sync_block();
        const int r = thread_index();
        if (r < tile_rows) {
            for (int kind = 0; kind < (ruled && tally.rule[r].times ? kKinds : 1); ++kind) {
                Part part{0, -INFINITY, -INFINITY, 0, 0};
                for (int w = 0; w < warps(); ++w) {
                    const uint64_t key = tally.best[kind][w][r];
                    const bool better = key > part.best;
                    part.best = better ? key : part.best;
                    part.above += tally.above[kind][w][r];
                    if (!parted) continue;
                    const Heard& heard = tally.heard[kind][w][r];
                    if (better) part.logit = heard.logit;
                    join(part.largest, part.sum, heard.largest, heard.sum);
                }
                if (parted) *judge.part(block_index(), kind, tile_first + r) = part;
                if (kind) continue;
                atomic_max(judge.best(tile_first + r), part.best);
                if (part.above) atomic_add(judge.above(tile_first + r), part.above);
            }
        }
        sync_block();
    };
    auto start = [&](int first, int count, int columns) {
        finish();
        best = 0, above = 0, tile_first = first, tile_rows = count;
        if (parted && lane() % (32 / R) == 0)
            for (int kind = 0; kind < kKinds; ++kind) {
                const int r = lane() / (32 / R);
                tally.heard[kind][warp()][r] = {-INFINITY, 0, -INFINITY, -INFINITY};
                tally.best[kind][warp()][r] = 0, tally.above[kind][warp()][r] = 0;
            }
        // The drafts' own logits come first, so that one reading of the head tells argmax and rank.
        for (int r = warp(); r < count; r += warps()) {
            if (ruled)
                open_row<typename Judge::Rules>(judge, first + r, tally, r);
            else if (lane() == 0)
                tally.rule[r] = {};
            if (lane() == 0) tally.kept[r] = parted ? judge.kept(first + r) : nullptr;
            sync_warp();
            int draft = judge.draft(first + r);
            float logit = 0;
            if (draft >= 0) {
                const int token = judge.token(draft);
                const float mask = judge.mask(draft, first + r);
                logit = add_mask(dot<W, kAligned>(s, draft, x + r * columns, columns), mask);
                logit = constrain(tally, r, logit, token);
                if (judge.scored() && !block_index() && lane() == 0) *judge.draft_logit(first + r) = logit;
                if (ruled) logit = hear(tally, r, logit, draft, token, false);
                if (!(logit > -INFINITY)) {  // Suppressed: all others go ahead.
                    if (!block_index() && lane() == 0) atomic_add(judge.above(first + r), s.outputs);
                    draft = -1;
                }
            }
            if (lane() == 0) tally.draft[r] = draft, tally.draft_logit[r] = logit;
        }
        sync_block();
    };
    auto begin = [&](int n, int r) { return judge.mask(n, r); };
    project<W, R, kAligned>(
        s, source, rows, memory, shared_floats, start, begin, [&](int n, int r, float value, float mask) {
            value = add_mask(value, mask);
            const int row = r - tile_first;
            if (ruled || parted)
                value = hear(tally, row, value, n, judge.token(n), parted && lane() % (32 / R) == 0);
            const uint64_t key = key_of(value, n);
            best = key > best ? key : best;
            above += leads(value, n, tally.draft_logit[row], tally.draft[row]);
        });
    finish();
}

}  // namespace kvspn::cuda
