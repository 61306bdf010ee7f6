// The logits of rows, reduced to the best of each and the number of those in front of the row's draft.
//
// A judge tells what they are held against: mask(output), which is added and loaded ahead; draft(row), or -1;
// and where the result joins those of other blocks: best(row), above(row).
#pragma once

#include "cuda/project.h"

namespace kvspn::cuda {

// A block's part of the result, and the drafts of a tile of rows.
struct Tally {
    uint64_t best[kThreads / 32][kTile];
    int32_t above[kThreads / 32][kTile];
    float draft_logit[kTile];
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

template <class W, int R, bool kAligned, class Source, class Judge>
__device__ __forceinline__ void verify(const Stage& s, const Source& source, const Judge& judge, int rows,
                                       Tally& tally, float* memory, int shared_floats) {
    const float* x = memory + kMoments;
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
            for (int w = 0; w < warps(); ++w) {
                key = key > tally.best[w][r] ? key : tally.best[w][r];
                count += tally.above[w][r];
            }
            atomic_max(judge.best(tile_first + r), key);
            if (count) atomic_add(judge.above(tile_first + r), count);
        }
        sync_block();
    };
    auto start = [&](int first, int count, int columns) {
        finish();
        best = 0, above = 0, tile_first = first, tile_rows = count;
        // The drafts' own logits come first, so that one reading of the head tells argmax and rank.
        for (int r = warp(); r < count; r += warps()) {
            const int draft = judge.draft(first + r);
            float logit = 0;
            if (draft >= 0) {
                const float mask = judge.mask(draft);
                logit = masked(dot<W, kAligned>(s, draft, x + r * columns, columns), mask);
            }
            if (lane() == 0) tally.draft[r] = draft, tally.draft_logit[r] = logit;
        }
        sync_block();
    };
    auto begin = [&](int n, int) { return judge.mask(n); };
    project<W, R, kAligned>(s, source, rows, memory, shared_floats, start, begin,
                            [&](int n, int r, float value, float mask) {
                                value = masked(value, mask);
                                const uint64_t key = key_of(value, n);
                                best = key > best ? key : best;
                                const int draft = tally.draft[r - tile_first];
                                const float logit = tally.draft_logit[r - tile_first];
                                above += draft >= 0 && (value > logit || (value == logit && n < draft));
                            });
    finish();
}

}  // namespace kvspn::cuda
