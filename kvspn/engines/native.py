"""The C++ engine (csrc): the whole decoder step as one call, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvspn import _native
from kvspn.engines.base import CachedEngine
from kvspn.ops.rules import Rule, Timestamps
from kvspn.weights import DecoderWeights
from kvspn.weights.decoder import named_tensors


def default_threads() -> int:
    """Cores that this process may keep busy: by its affinity, and by the CPU quota of its control groups."""
    return _native.default_threads()


class NativeEngine(CachedEngine):
    """One call of the C++ engine a step, on torch's present number of threads, or on :func:`default_threads`
    where these are fewer: threads that share a core only wait for one another.

    Activations and logits are fp32; weights stay in their own format, the cache in that of the embeddings.
    Integer weights meet activations rounded to int16, each row with its own scale. The instruction set is
    chosen at run time; the environment variable KVSPN_CPU (avx512vnni, avx512, avx2, portable) names another.
    """

    module: ClassVar[ModuleType] = _native
    device: ClassVar[str] = "cpu"  # of those that the module is built for

    def __init__(self, weights: DecoderWeights, **sizes: Any) -> None:
        super().__init__(weights, **sizes)
        wanted = self.module.DEVICES[self.device]
        if self._embed.device.type != wanted:
            raise ValueError(f"weights must be on the device {wanted}, got {self._embed.device}")
        self._made = self.module.Engine(
            {name: tensor.cpu() for name, tensor in named_tensors(weights)},
            layers=len(weights.layers),
            heads=weights.heads,
            blocks=len(weights.blocks),
            groups=weights.groups,
            last_layer_only=weights.last_layer_only,
            encoder_stride=weights.encoder_stride,
            key_heads=weights.architecture.key_heads,
            rms_norm=weights.architecture.rms_norm,
            norm_eps=weights.architecture.norm_eps,
            gated=weights.architecture.gated,
            rotary_base=weights.architecture.rotary_base,
            cross=weights.architecture.cross,
            threads=min(torch.get_num_threads(), default_threads()),
            device=self.device,
        )
        self._bind()

    @property
    def _engine(self) -> Any:
        """The C++ object, ready for a call."""
        return self._made

    def _bind(self) -> None:
        self._engine.bind(
            kv=self.cache.kv,
            lengths=self.lengths,
            tokens=self.tokens,
            finished=self.finished,
            stats=self.stats,
            cross_kv=self.cache.cross_kv,
            cross_lengths=self.cache.cross_lengths,
            kv_scale=self.cache.kv_scale,
            cross_kv_scale=self.cache.cross_kv_scale,
            cross_queries=self.cache.cross_queries,
        )

    def _encode(self, row: int, states: Tensor) -> None:
        self._engine.encode(row, states.detach())

    def _prefill(self, row: int, first: int, count: int, position: int | None) -> None:
        asked = {} if position is None else {"position": position, "logits": self.logits[row]}
        self._engine.prefill(row, count, first, **asked)

    def _choose(self, rules: Sequence[Rule], first: Sequence[int]) -> None:
        masks = (None if mask is None else mask.contiguous() for mask in (self._mask, self._first_mask))
        mask, first_mask = masks
        log_probs = self.log_probs if self._scored else None
        self._engine.choose(mask=mask, first_mask=first_mask, log_probs=log_probs)
        for row, (temperature, seed, timestamps, top_k) in enumerate(rules):
            begin, text_end, max_initial, prefix = timestamps or Timestamps(0, 0)
            self._engine.set_rule(
                row,
                temperature=temperature,
                seed=seed,
                timestamp_begin=begin,
                text_end=text_end,
                max_initial=-1 if max_initial is None else max_initial,
                prefix=prefix,
                top_k=top_k,
            )

    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        if draft_tokens is None:
            self._engine.step(k=k, eos=self._eos, max_length=self._max_length, draft=draft)
        else:
            drafts = draft_tokens.contiguous()
            self._engine.verify(drafts, k=k, eos=self._eos, max_length=self._max_length)

    def _run(self, k: int, draft: bool, steps: int) -> None:
        self._engine.run(k=k, eos=self._eos, max_length=self._max_length, draft=draft, steps=steps)

    @torch.no_grad()
    def profile(self, k: int = 1, draft: bool = True) -> list[tuple[str, int, int]]:
        """A step like step(), by its stages in order: name, nanoseconds, and bytes that it must read.

        A stage is what the threads do between two barriers: "self_qkv", "cross_attention", "draft.fc1", ...

        Raises:
            ValueError: on a CUDA device where a step is not one persistent kernel; of that, each stage is
                followed by the "barrier" behind it.
        """
        found: list[tuple[str, int, int]] = self._engine.profile(
            k=k, eos=self._eos, max_length=self._max_length, draft=draft
        )
        return found

    def plan(self, draft: bool = True) -> list[tuple[str, int]]:
        """The stages of such a step, by name, with the bytes that each must read; nothing runs."""
        stages = self._engine.plan(max_length=self._max_length, draft=draft)
        return [(name, size) for name, _, size in stages]

    def progress(self, row: int) -> list[int]:
        """The tokens that steps have given one row since start(): on a CUDA device also while run() runs."""
        return self._made.progress(row)
