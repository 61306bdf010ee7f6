"""The step by the references of the ops: plain PyTorch on any device, the oracle of every other engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.engines.base import CachedEngine
from kvspn.engines.cache import draft_first
from kvspn.ops.decoder_step import (
    REFERENCE,
    StepRule,
    StepState,
    base_pass,
    fitted,
    linear,
    step,
    step_rows,
)
from kvspn.ops.rules import Rule, pack_rules
from kvspn.weights import DecoderWeights
from kvspn.weights.linear import dequantise

PREFILL_CHUNK = 16  # query tokens of one pass


class ReferenceEngine(CachedEngine):
    """The plain-PyTorch references of the ops, one row at a time, on any device."""

    ops: Any = REFERENCE
    _rules: Tensor | None = None  # packed; None where every row is greedy and has no first mask

    def __init__(self, weights: DecoderWeights, **sizes: Any) -> None:
        super().__init__(weights, **sizes)
        self.ops = fitted(type(self).ops, weights.architecture)

    def _encode(self, row: int, states: Tensor) -> None:
        self.cache.write_cross(row, self._cross_kv(states))

    def _cross_kv(self, states: Tensor) -> Tensor:
        """Encoder states [E, d] of one row -> [L, 2, H, E, D]."""
        states = draft_first(states.float(), self._weights.encoder_stride)
        projections = []
        for layer in self._weights.layers:
            assert layer.cross_kv is not None
            weight, bias, scale = layer.cross_kv
            projections.append(
                F.linear(states, dequantise(weight, scale), None if bias is None else bias.float())
            )
        # [L, E, 2 * d] -> [L, 2, H, E, D]
        kv = torch.stack(projections).unflatten(2, (2, self._weights.heads, -1)).permute(0, 2, 3, 1, 4)
        return kv.to(self._embed.dtype)

    def _prefill(self, row: int, first: int, count: int, position: int | None) -> None:
        here, w = slice(row, row + 1), self._weights
        self.lengths[here] = first
        for at in range(first, count, PREFILL_CHUNK):
            ids = self.tokens[here, at : min(at + PREFILL_CHUNK, count)]
            x = base_pass(w, ids, self.cache.tensors.row(row), ops=self.ops)
            self.lengths[here] += ids.shape[1]
            if position is not None and 0 <= position - at < ids.shape[1]:
                state = x[0, position - at, None].float()
                self.logits[here] = linear(self.ops, state, w.head, w.norm)

    def _choose(self, rules: Sequence[Rule], first: Sequence[int]) -> None:
        plain = self._first_mask is None and all(
            rule.temperature == 0 and rule.timestamps is None for rule in rules
        )
        self._rules = None if plain else pack_rules(rules, first).to(self._embed.device)

    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        ended = self.finished.clone()
        step_rows(self._weights, self._state(), self._rule(k, draft, draft_tokens), self.ops)
        self._check_rows(self.finished & ~ended)

    def _together(self, rule: StepRule) -> None:
        """The step of all rows at once, by this engine's ops."""
        step(self.ops, self._weights, self._state(), rule)

    def _state(self) -> StepState:
        return StepState(self.cache.tensors, self.tokens, self.finished, self.stats)

    def _rule(self, k: int, draft: bool, draft_tokens: Tensor | None) -> StepRule:
        log_probs = self.log_probs if self._scored else None
        return StepRule(
            *(self._mask, k, self._eos, self._max_length, draft, draft_tokens),
            *(self._first_mask, self._rules, log_probs),
        )
