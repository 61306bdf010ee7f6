"""How a row's tokens are chosen, as data beside it: greedy, or sampled by noise that belongs to the token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvspn.checks import integer

RULE_WORDS = 4  # int32 of a packed rule


class Rule(NamedTuple):
    """What one row's tokens are chosen by.

    temperature: 0 for the largest logit; else a draw from the softmax of logits / temperature.
    seed: 0 .. 2^64 - 1; the row's noise, the same for whatever batch, drafts or k it is decoded with.
    """

    temperature: float = 0.0
    seed: int = 0


def check_rule(name: str, rule: Rule) -> None:
    """Raise TypeError or ValueError, naming the rule's field, unless it is one."""
    temperature, seed = rule
    name = f"{name}." if name else ""
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"{name}temperature must be a number, got {type(temperature).__name__}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{name}temperature must be 0 or a positive number, got {temperature}")
    integer(f"{name}seed", seed, 0, 2**64 - 1)


def pack_rules(rules: Sequence[Rule], first: Sequence[int]) -> Tensor:
    """Rules, and the index of each row's first token that is chosen -> int32 [B, 4].

    A row holds that index, the bits of the temperature, and the low and the high half of the seed, as
    ``RowRule`` of csrc/common/rule.h.
    """
    packed = torch.empty(len(rules), RULE_WORDS, dtype=torch.int32)
    for row, ((temperature, seed), index) in enumerate(zip(rules, first, strict=True)):
        halves = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).to(torch.int32)
        packed[row, 0] = index
        packed[row, 1:2] = torch.tensor([temperature], dtype=torch.float32).view(torch.int32)
        packed[row, 2:] = halves
    return packed


def disturb(logits: Tensor, rule: Tensor, index: int, tokens: Tensor) -> Tensor:
    """Logits [V] of ``tokens`` int [V] -> what they count as at an index of the row of a packed rule.

    logit / temperature - log(-log(u)), with u by :func:`uniform`: the largest is then a draw from the softmax
    of logit / temperature (Gumbel, 1954; Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014). At
    temperature 0 the logits themselves.
    """
    temperature = rule[1:2].view(torch.float32)
    if not temperature > 0:
        return logits
    low, high = (int(half) & 0xFFFFFFFF for half in rule[2:])
    return logits / temperature - (-uniform(low, high, index, tokens).log()).log()


def uniform(low: int, high: int, index: int, tokens: Tensor) -> Tensor:
    """fp32 numbers of (0, 1) in steps of 2^-23, one for each of ``tokens``.

    The first words of Philox4x32-10 at the counters (token, index, 0, 0), with the key (low, high) (Salmon,
    Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    """
    words = philox(low, high, tokens, index)
    return ((words[0] >> 9).float() + 0.5) * 2.0**-23


def philox(low: int, high: int, a: Tensor, b: int, c: int = 0, d: int = 0) -> tuple[Tensor, ...]:
    """Philox4x32-10 of the key (low, high) at the counters (a, b, c, d): four int64 tensors of 32 bits."""
    state = [a.long(), *(torch.full_like(a, word, dtype=torch.int64) for word in (b, c, d))]
    mask = 0xFFFFFFFF
    for _ in range(10):
        left, right = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57  # They wrap, and the bits are those.
        state = [
            (right >> 32 & mask) ^ state[1] ^ low,
            right & mask,
            (left >> 32 & mask) ^ state[3] ^ high,
            left & mask,
        ]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return tuple(state)


def row_seed(seed: int, row: int) -> int:
    """One row's seed from that of a batch, by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = 2**64 - 1
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
