"""The C++ engine (csrc): the whole decoder step as one call, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn import _native
from kvspn.engines import CachedEngine
from kvspn.ops import DecoderWeights
from kvspn.ops.weights import named_tensors


class NativeEngine(CachedEngine):
    """One call of the C++ engine a step, on torch's present number of threads.

    Activations and logits are fp32; weights stay in their own format, the cache in that of the embeddings.
    Integer weights meet activations rounded to int16, each row with its own scale. The instruction set is
    chosen at run time; the environment variable KVSPN_CPU (avx512vnni, avx512, avx2, portable) names another.
    """

    def __init__(self, weights: DecoderWeights, *, batch: int, capacity: int, cross_capacity: int) -> None:
        super().__init__(weights, batch=batch, capacity=capacity, cross_capacity=cross_capacity)
        if self._embed.device.type != "cpu":
            raise ValueError(f"weights must be on the CPU, got {self._embed.device}")
        named = dict(named_tensors(weights))
        self._engine = _native.Engine(
            named,
            layers=len(weights.layers),
            heads=weights.heads,
            blocks=len(weights.blocks),
            groups=weights.groups,
            last_layer_only=weights.last_layer_only,
            threads=torch.get_num_threads(),
        )
        self._engine.bind(
            kv=self.cache.kv,
            lengths=self.lengths,
            tokens=self.tokens,
            finished=self.finished,
            stats=self.stats,
            cross_kv=self.cache.cross_kv,
            cross_lengths=self.cache.cross_lengths,
        )

    def _encode(self, row: int, states: Tensor) -> None:
        self._engine.encode(row, states.detach())

    def _prefill(self, row: int, count: int) -> None:
        self._engine.prefill(row, count)

    def _step(self, mask: Tensor | None, k: int, draft: bool) -> None:
        mask = None if mask is None else mask.contiguous()
        self._engine.step(mask, k=k, eos=self._eos, max_length=self._max_length, draft=draft)
