// How a row's next token is chosen, as data that lies beside it on the device; and the noise of sampling.
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
    uint32_t seed[2];  // of the row, the low half in front
};
static_assert(sizeof(RowRule) == 16, "kvspn_verify_params holds it as four int32");

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
