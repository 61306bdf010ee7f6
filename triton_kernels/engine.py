"""The Triton engine: the step of all rows, composed from the ops here and, on a GPU, one captured graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvspn.engines.reference import ReferenceEngine
from kvspn.ops.decoder_step import MOST_DRAFTS
from kvspn.triton_kernels.decoder_step import LAUNCHERS
from kvspn.triton_kernels.launch import INTERPRETED
from kvspn.weights import DecoderWeights


class TritonEngine(ReferenceEngine):
    """A step reads nothing back: lengths, finished rows and acceptance stay on the device.

    On a GPU the first step of each kind is captured in a CUDA or HIP graph, and later ones replay it. A kind
    is k, draft or not, mask or not, and how many drafts the caller gives; a start with another eos or
    max_length forgets the graphs, since those are constants in them. Capturing warms up with every row
    finished, which changes nothing.
    """

    ops = LAUNCHERS

    def __init__(self, weights: DecoderWeights, **sizes: Any) -> None:
        super().__init__(weights, **sizes)
        device = self._embed.device
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            needed = "the CPU, where TRITON_INTERPRET=1 runs them" if INTERPRETED else "a GPU"
            raise ValueError(f"weights must be on {needed}, got {device}")
        self._graphs: dict[tuple[int, bool, bool, int], torch.cuda.CUDAGraph] = {}
        self._constants = (self._eos, self._max_length)
        with torch.inference_mode(False):
            self._mask_buffer = torch.zeros(len(self._embed), device=device)
            self._drafts_buffer = torch.zeros(MOST_DRAFTS, len(self.tokens), dtype=torch.int32, device=device)

    def _step(self, mask: Tensor | None, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        if mask is not None:
            self._mask_buffer.copy_(mask)
            mask = self._mask_buffer
        if draft_tokens is not None:
            drafts = self._drafts_buffer[: draft_tokens.shape[1]].T
            draft_tokens = drafts.copy_(draft_tokens)
        if INTERPRETED:
            self._together(mask, k, draft, draft_tokens)
            return
        if self._constants != (self._eos, self._max_length):
            self._constants = (self._eos, self._max_length)
            self._graphs.clear()
        kind = (k, draft, mask is not None, -1 if draft_tokens is None else draft_tokens.shape[1])
        with torch.cuda.device(self._embed.device):
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(mask, k, draft, draft_tokens)
            self._graphs[kind].replay()

    def _capture(
        self, mask: Tensor | None, k: int, draft: bool, draft_tokens: Tensor | None
    ) -> torch.cuda.CUDAGraph:
        finished = self.finished.clone()
        self.finished.fill_(True)
        self._together(mask, k, draft, draft_tokens)  # compiles what is not compiled yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._together(mask, k, draft, draft_tokens)
        self.finished.copy_(finished)
        return graph
