"""The Triton engine: the step of all rows, composed from the ops here and, on a GPU, one captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvspn.engines.reference import ReferenceEngine
from kvspn.ops.decoder_step import MOST_DRAFTS, StepRule
from kvspn.ops.rules import RULE_WORDS, Rule
from kvspn.triton_kernels.decoder_step import LAUNCHERS
from kvspn.triton_kernels.launch import INTERPRETED
from kvspn.weights import DecoderWeights


class TritonEngine(ReferenceEngine):
    """A step reads nothing back: lengths, finished rows and acceptance stay on the device.

    On a GPU the first step of each kind is captured in a CUDA or HIP graph, and later ones replay it. A kind
    is k, draft or not, how many drafts the caller gives, and what there is of masks, rules, queries and
    log-probabilities; a start with another eos or max_length forgets the graphs, since those are constants
    in them. Capturing warms up with every row finished, which changes nothing.
    """

    ops = LAUNCHERS

    def __init__(self, weights: DecoderWeights, **sizes: Any) -> None:
        super().__init__(weights, **sizes)
        device = self._embed.device
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            needed = "the CPU, where TRITON_INTERPRET=1 runs them" if INTERPRETED else "a GPU"
            raise ValueError(f"weights must be on {needed}, got {device}")
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        self._constants = (self._eos, self._max_length)
        rows = len(self.tokens)
        with torch.inference_mode(False):
            self._mask_buffers = torch.zeros(2, len(self._embed), device=device)
            self._rules_buffer = torch.zeros(rows * (RULE_WORDS + 1), dtype=torch.int32, device=device)
            self._drafts_buffer = torch.zeros(MOST_DRAFTS, rows, dtype=torch.int32, device=device)

    def _choose(self, rules: Sequence[Rule], first: Sequence[int]) -> None:
        super()._choose(rules, first)
        mask, first_mask = self._mask_buffers
        self._mask, self._first_mask = _copied(mask, self._mask), _copied(first_mask, self._first_mask)
        if self._rules is not None:
            self._rules = self._rules_buffer[: self._rules.numel()].view_as(self._rules).copy_(self._rules)

    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        if draft_tokens is not None:
            draft_tokens = self._drafts_buffer[: draft_tokens.shape[1]].T.copy_(draft_tokens)
        rule = self._rule(k, draft, draft_tokens)
        if INTERPRETED:
            self._together(rule)
            return
        if self._constants != (self._eos, self._max_length):
            self._constants = (self._eos, self._max_length)
            self._graphs.clear()
        drafts = -1 if draft_tokens is None else draft_tokens.shape[1]
        optional = (self._mask, self._first_mask, self.cache.cross_queries)
        words = 0 if self._rules is None else self._rules.shape[1]
        kind = (k, draft, drafts, words, *(tensor is not None for tensor in optional), self._scored)
        with torch.cuda.device(self._embed.device):
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(rule)
            self._graphs[kind].replay()

    def _capture(self, rule: StepRule) -> torch.cuda.CUDAGraph:
        finished = self.finished.clone()
        self.finished.fill_(True)
        self._together(rule)  # compiles what is not compiled yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._together(rule)
        self.finished.copy_(finished)
        return graph


def _copied(buffer: Tensor, values: Tensor | None) -> Tensor | None:
    """The values where a captured graph reads them."""
    return None if values is None else buffer.copy_(values)
