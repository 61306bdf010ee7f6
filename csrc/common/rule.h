// How a row's next token is chosen, as data that lies beside it on the device: the noise of sampling, and the
// grammar of Whisper's timestamps.
#pragma once

#include <cstdint>

#include "common/accept.h"

namespace kvspn {

// Greedy with zeros. At a temperature the logit of token v at index p of the row counts as
//     logit / temperature - log(-log(uniform(seed, p, v))),
// so that the largest is a draw from the softmax of logit / temperature (Gumbel, 1954; Maddison, Tarlow and
// Minka, "A* sampling", NeurIPS 2014). The noise belongs to the token and not to who asks, and a drafted
// token that equals the draw of the base model is found by the same comparison as in greedy decoding.
struct RowRule {
    int32_t first;  // index of the first token that is chosen, to which the first mask belongs
    float temperature;
    uint32_t seed[2];    // of the row, the low half in front
    int32_t times;       // the token of 0.00 s; 0: no grammar
    int32_t text_end;    // the end-of-text token: what lies between it and `times` may follow a segment's end
    int32_t last_first;  // the first token is at most this timestamp
    int32_t prefix;      // tokens of the prompt, at its end, that belong to the text
    int32_t top_k;       // a draw is among so many of the largest masked logits, and their equals; 0: all
};
constexpr int kRuleWords = 9;  // of int32, as kvspn_verify_params holds it
static_assert(sizeof(RowRule) == 4 * kRuleWords, "there is nothing between the words");

// Whether a row's draw is among a part of its logits: it then needs all of them at once.
KVSPN_INLINE bool is_cut(const RowRule& rule) { return rule.temperature > 0 && rule.top_k > 0; }

constexpr int32_t kLastToken = 0x7fffffff;  // above all tokens

// The text of a row so far: how many tokens, the newest two, and the largest timestamp, or -1.
struct History {
    int32_t count = 0, newest = -1, before = -1, time = -1;
};
KVSPN_INLINE void push(History& history, int32_t token, const RowRule& rule) {
    ++history.count, history.before = history.newest, history.newest = token;
    if (token >= rule.times && token > history.time) history.time = token;
}

// What may come next: tokens from `text` to rule.times, and timestamps lowest ... highest.
struct Window {
    int32_t text, lowest, highest;
};
KVSPN_INLINE Window window_of(const RowRule& rule, const History& history) {
    if (history.count <= 0) return {rule.times, rule.times, rule.last_first};
    if (history.newest < rule.times) return {0, history.time < 0 ? rule.times : history.time + 1, kLastToken};
    if (history.count == 1 || history.before >= rule.times)  // A segment has begun.
        return {0, kLastToken, kLastToken - 1};
    return {rule.text_end, history.time, kLastToken};
}
KVSPN_INLINE bool allows(const RowRule& rule, const Window& window, int32_t token) {
    const bool text = token < rule.times;  // without a branch, as loops over the vocabulary ask
    return (token >= (text ? window.text : window.lowest)) & (text | (token <= window.highest));
}

// A number of (0, 1) in steps of 2^-23: the first word of Philox4x32-10 at the counter (token, index, 0, 0)
// (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
KVSPN_INLINE float uniform(uint32_t seed_low, uint32_t seed_high, uint32_t index, uint32_t token) {
    uint32_t a = token, b = index, c = 0, d = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t left = uint64_t(a) * 0xd2511f53u, right = uint64_t(c) * 0xcd9e8d57u;
        a = uint32_t(right >> 32) ^ b ^ seed_low, b = uint32_t(right);
        c = uint32_t(left >> 32) ^ d ^ seed_high, d = uint32_t(left);
        seed_low += 0x9e3779b9u, seed_high += 0xbb67ae85u;
    }
    return (float(int32_t(a >> 9)) + 0.5f) * 0x1p-23f;
}

}  // namespace kvspn
