"""How a row's tokens are chosen, as data beside it: greedy, or sampled by noise that belongs to the token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvspn.checks import INT32, Shapes, integer

RULE_WORDS = 8  # int32 of a packed rule; one more where a rule of the batch has a top_k
_LAST = 2**31 - 1  # no token, and above all


class Timestamps(NamedTuple):
    """The grammar of Whisper's timestamps ("Robust speech recognition via large-scale weak supervision",
    arXiv 2212.04356, section 2.3; the rules are those of its published decoder).

    A row's first token is a timestamp. Timestamps stand in pairs, the end of a segment and the start of the
    next, and never decrease; a segment is not empty. Where all timestamps together are likelier than every
    token of text, the token is a timestamp.

    begin: token of 0.00 s; all from there on are timestamps. text_end: the end-of-text token; what is below
        is text, and what lies from it to ``begin`` may follow a segment's end. max_initial: the first token
        is at most ``begin`` + this; None for no limit. prefix: so many tokens at the prompt's end are the
        text's own, its first timestamp among them.
    """

    begin: int
    text_end: int
    max_initial: int | None = None
    prefix: int = 0


class Rule(NamedTuple):
    """What one row's tokens are chosen by.

    temperature: 0 for the largest logit; else a draw from the softmax of logits / temperature.
    seed: 0 .. 2^64 - 1; the row's noise, the same for whatever batch, drafts or k it is decoded with.
    timestamps: the grammar that tokens keep to; None for none.
    top_k: with a temperature, the draw is among so many of the largest masked logits, and those equal to the
        least of them; 0 for all.
    """

    temperature: float = 0.0
    seed: int = 0
    timestamps: Timestamps | None = None
    top_k: int = 0


def check_rule(name: str, rule: Rule) -> None:
    """Raise TypeError or ValueError, naming the rule's field, unless it is one."""
    temperature, seed, timestamps, top_k = rule
    name = f"{name}." if name else ""
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"{name}temperature must be a number, got {type(temperature).__name__}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{name}temperature must be 0 or a positive number, got {temperature}")
    integer(f"{name}seed", seed, 0, 2**64 - 1)
    integer(f"{name}top_k", top_k, 0, _LAST)
    if top_k and not temperature:
        raise ValueError(f"{name}top_k must be 0 without a temperature, got {top_k}")
    if timestamps is None:
        return
    if not isinstance(timestamps, Timestamps):
        raise TypeError(f"{name}timestamps must be Timestamps or None, got {type(timestamps).__name__}")
    integer(f"{name}timestamps.begin", timestamps.begin, 1, _LAST)
    integer(f"{name}timestamps.text_end", timestamps.text_end, 0, timestamps.begin)
    if timestamps.max_initial is not None:
        integer(f"{name}timestamps.max_initial", timestamps.max_initial, 0, _LAST)
    integer(f"{name}timestamps.prefix", timestamps.prefix, 0, _LAST)


def check_packed(shapes: Shapes, rules: Tensor) -> None:
    """Raise TypeError or ValueError unless they can be the packed rules of B rows."""
    shapes.tensor("rules", rules, "B W", INT32)
    if shapes["W"] not in (RULE_WORDS, RULE_WORDS + 1):
        raise ValueError(
            f"rules must hold {RULE_WORDS} or {RULE_WORDS + 1} words of a row, got {shapes['W']}"
        )


def pack_rules(rules: Sequence[Rule], first: Sequence[int]) -> Tensor:
    """Rules, and the index of each row's first token that is chosen -> int32 [B, 8], or [B, 9] with a top_k.

    A row holds that index, the bits of the temperature, the low and the high half of the seed, the token of
    0.00 s (0 for no grammar), the end of text, the last token of a first timestamp, the length of the prefix,
    and top_k, as ``RowRule`` of csrc/common/rule.h. Without it a device need not keep the logits of any row.
    """
    cut = any(rule.top_k for rule in rules)
    packed = torch.zeros(len(rules), RULE_WORDS + cut, dtype=torch.int32)
    for row, ((temperature, seed, timestamps, top_k), index) in enumerate(zip(rules, first, strict=True)):
        halves = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).to(torch.int32)
        packed[row, 0] = index
        packed[row, 1:2] = torch.tensor([temperature], dtype=torch.float32).view(torch.int32)
        packed[row, 2:4] = halves
        packed[row, RULE_WORDS:] = top_k
        if timestamps is not None:
            begin, text_end, most, prefix = timestamps
            last = _LAST if most is None else min(begin + most, _LAST)
            packed[row, 4:8] = torch.tensor([begin, text_end, last, prefix])
    return packed


def constrain(logits: Tensor, rule: Tensor, before: Sequence[int], tokens: Tensor) -> Tensor:
    """Logits [V] of ``tokens`` int [V] -> with -inf added where the :class:`Timestamps` of a packed rule
    forbid the token; ``before``: the row's text so far, from the first that belongs to it."""
    begin, text_end, last_first = rule[4:7].tolist()
    if not begin:
        return logits
    text, lowest, highest = _window(begin, text_end, last_first, before)
    times = tokens >= begin
    allowed = torch.where(times, (tokens >= lowest) & (tokens <= highest), tokens >= text)
    logits = logits + torch.where(allowed, 0.0, -torch.inf)
    if times.any() and not times.all() and logits[times].logsumexp(0) > logits[~times].max():
        logits = logits + torch.where(times, 0.0, -torch.inf)
    return logits


def _window(begin: int, text_end: int, last_first: int, before: Sequence[int]) -> tuple[int, int, int]:
    """The first token of text, and the first and last timestamp, that may come after those ``before``."""
    if not before:
        return begin, begin, last_first
    newest = max((token for token in before if token >= begin), default=None)
    if before[-1] < begin:
        return 0, begin if newest is None else newest + 1, _LAST
    if len(before) == 1 or before[-2] >= begin:
        return 0, _LAST, _LAST - 1  # a segment has begun
    return text_end, begin if newest is None else newest, _LAST


def disturb(logits: Tensor, rule: Tensor, index: int, tokens: Tensor) -> Tensor:
    """Logits [V] of ``tokens`` int [V] -> what they count as at an index of the row of a packed rule.

    logit / temperature - log(-log(u)), with u by :func:`uniform`: the largest is then a draw from the softmax
    of logit / temperature (Gumbel, 1954; Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014). -inf for
    what is smaller than the top_k-th largest, where the rule has one: what equals it stays, as in
    transformers. At temperature 0 the logits themselves.
    """
    temperature, top_k = rule[1:2].view(torch.float32), int(rule[RULE_WORDS:].sum())
    if not temperature > 0:
        return logits
    if 0 < top_k < len(logits):
        logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
    low, high = (int(half) & 0xFFFFFFFF for half in rule[2:4])
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
