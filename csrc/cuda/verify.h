// The logits of rows, reduced to the best of each and the number of those in front of the row's draft.
//
// A judge tells what they are held against: mask(output, row), which is added and loaded ahead; draft(row),
// or -1; and where the result joins those of other blocks: best(row), above(row). Where it is ruled(), also
// what rule(row) says of index(row) and token(output); and where it is scored(), part(row) and
// draft_logit(row), for what the block has heard and the draft's own logit.
#pragma once

#include "cuda/project.h"

namespace kvspn::cuda {

// Of some of a row's logits: the largest, the sum of exponentials over it, and of what they count as under
// the row's rule the largest, with its logit.
struct Heard {
    float largest, sum, top, logit;
};
__device__ __forceinline__ Heard nothing() { return {-INFINITY, 0, -INFINITY, -INFINITY}; }

// A block's part of the result, and the drafts of a tile of rows.
struct Tally {
    uint64_t best[kThreads / 32][kTile];
    int32_t above[kThreads / 32][kTile];
    Heard heard[kThreads / 32][kTile];
    float draft_logit[kTile];  // what it counts as
    int32_t draft[kTile];
};

// Order-preserving: a larger logit, then a smaller id, is a larger key. 0: none yet.
__device__ __forceinline__ uint64_t key_of(float logit, int id) {
    const uint32_t bits = as_bits(logit + 0.f);  // -0 becomes 0
    return uint64_t(bits & 0x80000000 ? ~bits : bits | 0x80000000) << 32 | (0xffffffff - uint32_t(id));
}
// -1 where the largest key is that of NaN, which is above all others, or of -inf.
__device__ __forceinline__ int id_of(uint64_t key) {
    const bool chosen = key <= key_of(INFINITY, 0) && key > key_of(-INFINITY, 0);
    return chosen ? int(0xffffffff - uint32_t(key)) : -1;
}

// What a logit counts as under a row's rule; heard: of those that are scored, or null. Not inlined: the loop
// over the vocabulary, for which this is the exception, has no register to spare. The rule comes by its
// words: by reference it would have to be in memory.
static __device__ __attribute__((noinline)) float hear(Heard* heard, float logit, float temperature,
                                                       uint32_t seed_low, uint32_t seed_high, int index,
                                                       int token) {
    float counted = logit;
    if (temperature > 0) {
        const float number = uniform(seed_low, seed_high, uint32_t(index), uint32_t(token));
        counted = logit / temperature - logf(-logf(number));
    }
    if (!heard) return counted;
    if (logit > heard->largest) {
        heard->sum = heard->sum * expf(heard->largest - logit) + 1;
        heard->largest = logit;
    } else if (logit > -INFINITY) {
        heard->sum += expf(logit - heard->largest);
    }
    if (counted > heard->top) heard->top = counted, heard->logit = logit;
    return counted;
}

// Sums of exponentials, in the order of the calls.
__device__ __forceinline__ void join(float& largest, float& sum, float other_largest, float other_sum) {
    if (other_sum == 0) return;
    const float top = fmaxf(largest, other_largest);
    sum = (sum == 0 ? 0 : sum * expf(largest - top)) + other_sum * expf(other_largest - top);
    largest = top;
}

// The log-sum-exp of a row's logits and the logit of its choice, from the parts of all blocks in their order.
struct Score {
    float log_sum_exp, logit;
};
__device__ __forceinline__ Score score(const Part* parts, int64_t stride, int blocks, uint64_t best) {
    float largest = -INFINITY, sum = 0, logit = -INFINITY;
    for (int i = 0; i < blocks; ++i) {
        const Part* part = parts + i * stride;
        join(largest, sum, fresh(&part->largest), fresh(&part->sum));
        if (fresh(&part->best) == best) logit = fresh(&part->logit);
    }
    return {largest + logf(sum), logit};
}

template <class W, int R, bool kAligned, class Source, class Judge>
__device__ __forceinline__ void verify(const Stage& s, const Source& source, const Judge& judge, int rows,
                                       Tally& tally, float* memory, int shared_floats) {
    const float* x = memory + kMoments;
    const bool ruled = judge.ruled(), scored = judge.scored();
    auto masked = [](float logit, float mask) {
        logit += mask;
        return logit == logit ? logit + 0.f : NAN;
    };
    uint64_t best = 0;
    int above = 0, tile_first = 0, tile_rows = 0;
    auto finish = [&] {  // the block's result of a tile joins those of the others
        if (!tile_rows) return;
        if (lane() % (32 / R) == 0) {
            tally.best[warp()][lane() / (32 / R)] = best;
            tally.above[warp()][lane() / (32 / R)] = above;
        }
        sync_block();
        const int r = thread_index();
        if (r < tile_rows) {
            uint64_t key = 0;
            int count = 0;
            Heard heard = nothing();
            for (int w = 0; w < warps(); ++w) {
                const bool better = tally.best[w][r] > key;
                key = better ? tally.best[w][r] : key;
                count += tally.above[w][r];
                if (!scored) continue;
                if (better) heard.logit = tally.heard[w][r].logit;
                join(heard.largest, heard.sum, tally.heard[w][r].largest, tally.heard[w][r].sum);
            }
            if (scored) *judge.part(tile_first + r) = {key, heard.logit, heard.largest, heard.sum};
            atomic_max(judge.best(tile_first + r), key);
            if (count) atomic_add(judge.above(tile_first + r), count);
        }
        sync_block();
    };
    auto start = [&](int first, int count, int columns) {
        finish();
        best = 0, above = 0, tile_first = first, tile_rows = count;
        if (scored && lane() % (32 / R) == 0) tally.heard[warp()][lane() / (32 / R)] = nothing();
        // The drafts' own logits come first, so that one reading of the head tells argmax and rank.
        for (int r = warp(); r < count; r += warps()) {
            const int draft = judge.draft(first + r);
            float logit = 0;
            if (draft >= 0) {
                const float mask = judge.mask(draft, first + r);
                logit = masked(dot<W, kAligned>(s, draft, x + r * columns, columns), mask);
                if (scored && !block_index() && lane() == 0) *judge.draft_logit(first + r) = logit;
                if (ruled) {
                    const RowRule rule = judge.rule(first + r);
                    logit = hear(nullptr, logit, rule.temperature, rule.seed[0], rule.seed[1],
                                 judge.index(first + r), judge.token(draft));
                }
            }
            if (lane() == 0) tally.draft[r] = draft, tally.draft_logit[r] = logit;
        }
        sync_block();
    };
    auto begin = [&](int n, int r) { return judge.mask(n, r); };
    project<W, R, kAligned>(
        s, source, rows, memory, shared_floats, start, begin, [&](int n, int r, float value, float mask) {
            value = masked(value, mask);
            if (ruled || scored) {
                const bool keeps = scored && lane() % (32 / R) == 0;
                const RowRule rule = judge.rule(r);
                value = hear(keeps ? &tally.heard[warp()][r - tile_first] : nullptr, value, rule.temperature,
                             rule.seed[0], rule.seed[1], judge.index(r), judge.token(n));
            }
            const uint64_t key = key_of(value, n);
            best = key > best ? key : best;
            const int draft = tally.draft[r - tile_first];
            const float logit = tally.draft_logit[r - tile_first];
            above += draft >= 0 && (value > logit || (value == logit && n < draft));
        });
    finish();
}

}  // namespace kvspn::cuda
