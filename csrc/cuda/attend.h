// Attention of a few queries to the keys and values of several layers, and to a tail, under one softmax.
//
// A place tells where queries come from and results go: row(slot), length(slot), four(slot, query, head,
// column), store(slot, query, head, column, value); with kTail, tail_length(slot); and where int8 is still to
// be written, append(slot, head, first, last) does so for positions first to last - 1.
#pragma once

#include "cuda/grid.h"

namespace kvspn::cuda {

// One query's partial results, `next` floats apart, to its result: store(column, value). The softmax goes on
// from piece to piece; a piece's loads, scores and sums alike, are under way together. A lane has four
// columns of every n-th split, so that more splits without a weight change no bit.
template <class Store>
__device__ __forceinline__ void combine(const float* partials, int64_t next, int splits, int width,
                                        Store store) {
    constexpr int kLoads = 12;
    for (int left = 0; left < width; left += 128) {
        int lanes = 1;  // that share a split
        while (lanes < 32 && 4 * lanes < width - left) lanes *= 2;
        const int column = left + lane() % lanes * 4, spot = lane() / lanes, at_once = 32 / lanes;
        const int piece = min(32, kLoads * at_once);
        float highest = -INFINITY, total = 0, sum[4] = {};
        for (int first = 0; first < splits; first += piece) {
            const int own = first + lane();
            float2 score{-INFINITY, 0};
            if (lane() < piece && own < splits)
                score = fresh(reinterpret_cast<const float2*>(partials + own * next));
            float4 sums[kLoads];
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int n = spot + i * at_once;
                sums[i] = float4{0, 0, 0, 0};
                if (n < piece && first + n < splits && column < width)
                    sums[i] = fresh(reinterpret_cast<const float4*>(partials + (first + n) * next +
                                                                    kPartialHead + column));
            }
            const float before = highest;
            highest = fmaxf(highest, max_of_warp(score.x));
            const float kept = before > -INFINITY ? expf(before - highest) : 0.f;
            const float weight = score.x > -INFINITY ? expf(score.x - highest) : 0.f;
            total = fmaf(total, kept, sum_of_warp(weight * score.y));
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[c] *= kept;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const float w = from_lane(weight, spot + i * at_once);
                sum[0] = fmaf(w, sums[i].x, sum[0]), sum[1] = fmaf(w, sums[i].y, sum[1]);
                sum[2] = fmaf(w, sums[i].z, sum[2]), sum[3] = fmaf(w, sums[i].w, sum[3]);
            }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            sum[c] = sum_of_warp(sum[c], lanes);
            if (spot == 0 && column + c < width) store(column + c, total != 0 ? sum[c] / total : 0.f);
        }
    }
}

// Split by layer and position. A warp holds a split's keys and values in registers while all queries pass by;
// the last warp of a row and head combines, the tail's splits first, then the layers' by position: so more
// positions, which a later query sees, only add empty splits at the end.
template <class KV, bool kAligned, class Place>
__device__ __forceinline__ void attend(const Attention& a, const Place& place) {
    constexpr int E = kPerLoad<KV>;
    constexpr bool kScaled = std::is_same_v<KV, int8_t>;
    constexpr int kLoads = kScaled ? kInt8Loads : kFloatLoads;
    const int D = a.width, group = a.lanes, at_once = 32 / group, split = at_once * kLoads;
    const int part = lane() % group, spot = lane() / group;
    const bool used = part * E < D;
    const int queries = a.queries * a.sharing, pitch = a.pitch;
    const auto splits_of = [&](int positions) { return (positions + split - 1) / split; };
    const int most =
        (Place::kTail ? splits_of(a.tail.capacity) : 0) + a.layers * max(1, splits_of(a.cache.capacity));

    for (int task = grid_warp(); task < most * a.slots * a.heads; task += grid_warps()) {
        const int head = task % a.heads, slot = task / a.heads % a.slots, index = task / a.heads / a.slots;
        const int length = place.length(slot);
        int tail = 0;
        if constexpr (Place::kTail) tail = place.tail_length(slot);
        const int limit = min(max(length + (a.causal ? a.queries : 0), 0), a.cache.capacity);
        const int tails = Place::kTail ? splits_of(tail) : 0,
                  splits = tails + a.layers * max(1, splits_of(limit));
        if (index >= splits) continue;
        const bool of_tail = Place::kTail && index < tails;
        const int layer = of_tail ? 0 : (index - tails) % a.layers, end = of_tail ? tail : limit;
        const int first = (of_tail ? index : (index - tails) / a.layers) * split + spot;
        const auto pick = [&](auto KeyValues::* field) { return of_tail ? a.tail.*field : a.cache.*field; };
        const KV* keys = static_cast<const KV*>(pick(&KeyValues::keys)) + layer * a.cache.layer +
                         place.row(slot) * pick(&KeyValues::row) + head * pick(&KeyValues::head);
        const int64_t position = pick(&KeyValues::position), to_values = pick(&KeyValues::part);
        const auto load = [&](int t, int64_t values) {
            const KV* from = keys + values + t * position;
            if (!used || t >= end) return uint4{0, 0, 0, 0};
            return kAligned ? load_kv(from + part * E)
                            : load_elements<KV>(reinterpret_cast<const char*>(from), 16 * part,
                                                D * int(sizeof(KV)));
        };
        if constexpr (kScaled) place.append(slot, head, first - spot, min(first - spot + split, end));
        uint4 k[kLoads], v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) k[i] = load(first + i * at_once, 0);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) v[i] = load(first + i * at_once, to_values);
        float key_scale[kLoads], value_scale[kLoads];
        if constexpr (kScaled) {
            const float* scales = static_cast<const float*>(a.scales.keys) + layer * a.scales.layer +
                                  place.row(slot) * a.scales.row + head * a.scales.head;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int t = first + i * at_once;
                key_scale[i] = t < end ? fresh(scales + t) : 0.f;
                value_scale[i] = t < end ? fresh(scales + a.scales.part + t) : 0.f;
            }
        }
        float* partials = a.partials + (int64_t(slot) * a.heads + head) * most * queries * pitch;
        const auto load_query = [&](int i, float4(&q)[E / 4]) {
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                q[e / 4] = float4{0, 0, 0, 0};
                if (i < queries && part * E + e < D)
                    q[e / 4] =
                        place.four(slot, i / a.sharing, head * a.sharing + i % a.sharing, part * E + e);
            }
        };
        float4 next[E / 4];
        load_query(0, next);
        for (int i = 0; i < queries; ++i) {
            const int query = i / a.sharing;
            const int seen = a.causal && !of_tail ? min(length + query + 1, limit) : end;
            float q[E], score[kLoads], most_score = -INFINITY;
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                const float4 four = next[e / 4];
                q[e] = four.x, q[e + 1] = four.y, q[e + 2] = four.z, q[e + 3] = four.w;
            }
            load_query(i + 1, next);
#pragma unroll
            for (int l = 0; l < kLoads; ++l) {
                float key[E], product = 0;
                if constexpr (kScaled) forget_origin(k[l]);  // a split's floats would not fit
                unpack(k[l], key, KV{});
#pragma unroll
                for (int e = 0; e < E; ++e) product = fmaf(q[e], key[e], product);
                for (int mask = group / 2; mask > 0; mask /= 2) product += from_lane_xor(product, mask);
                product *= a.scale;
                if constexpr (kScaled) product *= key_scale[l];
                score[l] = first + l * at_once < seen ? product : -INFINITY;
                most_score = fmaxf(most_score, score[l]);
            }
            most_score = max_of_warp(most_score);
            float total = 0, sum[E] = {};
#pragma unroll
            for (int l = 0; l < kLoads; ++l) {
                float value[E];
                if constexpr (kScaled) forget_origin(v[l]);
                unpack(v[l], value, KV{});
                // Not a product with 0: what a query does not see may be infinite.
                const bool sees = score[l] != -INFINITY;
                float weight = sees ? expf(score[l] - most_score) : 0.f;
                total += weight;
                if constexpr (kScaled) weight *= value_scale[l];
#pragma unroll
                for (int e = 0; e < E; ++e) sum[e] = sees ? fmaf(weight, value[e], sum[e]) : sum[e];
            }
            total = sum_of_warp(total, group);
#pragma unroll
            for (int e = 0; e < E; ++e) sum[e] = sum_of_warp(sum[e], group);
            float* to = partials + (int64_t(index) * queries + i) * pitch;
            if (lane() == 0) *reinterpret_cast<float2*>(to) = float2{most_score, total};
            if (spot == 0 && used) {
#pragma unroll
                for (int e = 0; e < E; ++e)
                    if (kAligned || part * E + e < D) to[kPartialHead + part * E + e] = sum[e];
            }
        }
        sync_warp();
        int last = 0;
        if (lane() == 0) {
            int32_t* arrived = a.arrived + slot * a.heads + head;
            last = add_acquire_release(arrived, 1) == splits - 1;
            if (last) *arrived = 0;
        }
        last = from_lane(last, 0);
        sync_warp();
        if (!last) continue;
        for (int i = 0; i < queries; ++i) {
            const auto store = [&](int column, float value) {
                place.store(slot, i / a.sharing, head * a.sharing + i % a.sharing, column, value);
            };
            combine(partials + int64_t(i) * pitch, int64_t(queries) * pitch, splits, D, store);
        }
        sync_warp();
    }
}

}  // namespace kvspn::cuda
