// Attention of a few queries to the keys and values of several layers, and to a tail, under one softmax.
//
// A place tells where queries come from and results go: row(slot), length(slot), tail_length(slot),
// four(slot, query, head, column), store(slot, query, head, column, value); and where int8 is still to be
// written, append(slot, head, first, last) does so for positions first to last - 1.
#pragma once

#include "cuda/grid.h"

namespace kvspn::cuda {

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
    const int queries = a.queries * a.sharing, pitch = 2 + D;
    const auto splits_of = [&](int positions) { return (positions + split - 1) / split; };
    const int most = splits_of(a.tail.capacity) + a.layers * max(1, splits_of(a.cache.capacity));

    for (int task = grid_warp(); task < most * a.slots * a.heads; task += grid_warps()) {
        const int head = task % a.heads, slot = task / a.heads % a.slots, index = task / a.heads / a.slots;
        const int length = place.length(slot), tail = place.tail_length(slot);
        const int limit = min(max(length + (a.causal ? a.queries : 0), 0), a.cache.capacity);
        const int tails = splits_of(tail), splits = tails + a.layers * max(1, splits_of(limit));
        if (index >= splits) continue;
        const bool of_tail = index < tails;
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
        for (int i = 0; i < queries; ++i) {
            const int query = i / a.sharing, query_head = head * a.sharing + i % a.sharing;
            const int seen = a.causal && !of_tail ? min(length + query + 1, limit) : end;
            float q[E], score[kLoads], most_score = -INFINITY;
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                float4 four{0, 0, 0, 0};
                if (part * E + e < D) four = place.four(slot, query, query_head, part * E + e);
                q[e] = four.x, q[e + 1] = four.y, q[e + 2] = four.z, q[e + 3] = four.w;
            }
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
            if (lane() == 0) to[0] = most_score, to[1] = total;
            if (spot == 0 && used) {
#pragma unroll
                for (int e = 0; e < E; ++e)
                    if (kAligned || part * E + e < D) to[2 + part * E + e] = sum[e];
            }
        }
        sync_warp();
        int last = 0;
        if (lane() == 0) {
            int32_t* arrived = a.arrived + slot * a.heads + head;
            fence();
            last = atomic_add(arrived, 1) == splits - 1;
            if (last) *arrived = 0;
            fence();
        }
        if (!from_lane(last, 0)) continue;
        for (int i = 0; i < queries; ++i) {
            const int query = i / a.sharing, query_head = head * a.sharing + i % a.sharing;
            const float* from = partials + int64_t(i) * pitch;
            const int64_t next = int64_t(queries) * pitch;
            float highest = -INFINITY, total = 0;
            for (int n = lane(); n < splits; n += 32) highest = fmaxf(highest, fresh(from + n * next));
            highest = max_of_warp(highest);
            auto weight = [&](float score) { return score > -INFINITY ? expf(score - highest) : 0.f; };
            for (int n = lane(); n < splits; n += 32)
                total = fmaf(weight(fresh(from + n * next)), fresh(from + n * next + 1), total);
            total = sum_of_warp(total);
            for (int c = lane(); c < D; c += 32) {
                float sum = 0;
#pragma unroll 4
                for (int n = 0; n < splits; ++n)
                    sum = fmaf(weight(fresh(from + n * next)), fresh(from + n * next + 2 + c), sum);
                place.store(slot, query, query_head, c, total != 0 ? sum / total : 0.f);
            }
        }
        sync_warp();
    }
}

}  // namespace kvspn::cuda
