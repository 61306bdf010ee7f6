"""Whether an engine's step is right: stored weights against the fp32 ones, logits against the fp32 reference.

An engine shows no logits, only which token is best. So it is asked for the best of a few tokens, many times,
with a mask that forbids the others. By the reference's logits each choice is the best of those few, or falls
short of it by as little as rounding explains. What a format loses is no rounding of the step: the reference
runs on the fp32 values that the stored weights stand for, and these are compared with the weights as they
were. Hence a layer left out, or zeros in place of its weights, show in int4 as they do in fp32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvspn.engines import Engine
from kvspn.engines.reference import ReferenceEngine
from kvspn.measure.shapes import Shape, begin, capacities
from kvspn.ops import K_INF
from kvspn.ops.decoder_step import REFERENCE
from kvspn.weights import DecoderWeights
from kvspn.weights.decoder import named_tensors
from kvspn.weights.formats import FORMATS, base_and_draft, dequantised

CHOICES, FEW = 48, 64  # times that an engine chooses, and tokens to choose from

# By how much choices fall short on average, in standard deviations of the logits. In bf16, the caches beside
# integers too, keys and values are rounded: that takes 0.001, a layer of 12 left out 0.04 and more.
SHORT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 0.01}


class Expected:
    """What the first row of an engine must do at a shape.

    Args:
        made: the decoder, fp32. stored: the same as the engine has it, in a format. kv: of the engine.
    """

    def __init__(
        self, made: DecoderWeights, stored: DecoderWeights, fmt: str, shape: Shape, kv: str | None
    ) -> None:
        values = dequantised(stored)
        self._shape = shape
        self._stored = stored_well(made, values, fmt)
        self._draft, self._base = _logits(values, shape, kv)
        if stored.draft_ids is not None:
            listed, self._draft = self._draft, torch.full_like(self._base, -torch.inf)
            self._draft[stored.draft_ids] = listed
        self._short = SHORT[stored.embed_tokens.dtype if kv is None else torch.bfloat16]
        generator = torch.Generator().manual_seed(0)
        ids = torch.arange(shape.vocabulary) if stored.draft_ids is None else stored.draft_ids.cpu()
        order = torch.rand(CHOICES, len(ids), generator=generator).argsort(1)
        self._tokens = ids[order[:, :FEW]].long()

    def of(self, engine: Engine) -> bool:
        """Whether it does; it is begun anew before and after."""
        if not self._stored:
            return False
        mask = torch.empty(self._shape.vocabulary, device=engine.tokens.device)
        short: dict[bool, list[float]] = {False: [], True: []}
        begin(engine, self._shape, mask.zero_())
        at = self._shape.length
        for tokens in self._tokens:
            mask.fill_(-torch.inf)[tokens] = 0
            for draft, logits in ((False, self._base), (True, self._draft)):
                engine.lengths.fill_(at)
                engine.finished.fill_(False)
                engine.step(K_INF, draft)
                chosen = int(engine.tokens[0, at + 1])
                if chosen not in tokens:
                    return False
                few = logits[tokens]
                short[draft].append(float((few.max() - logits[chosen]) / few[few.isfinite()].std()))
        begin(engine, self._shape)
        return all(sum(each) / len(each) <= self._short for each in short.values())


def stored_well(made: DecoderWeights, values: DecoderWeights, fmt: str) -> bool:
    """Whether the values that stored weights stand for are the fp32 ones, up to what the format explains."""
    base, draft = base_and_draft(fmt)
    exact = dict(named_tensors(made)) | {"draft_head.weight": made.draft_output.weight}
    for name, value in named_tensors(values):
        if value.ndim < 2:  # norms and biases, some of them zeros
            continue
        width = draft if name.startswith(("blocks.", "draft_head")) else base
        error = (value - exact[name]).norm() / exact[name].norm()
        if not error <= FORMATS[width].error:  # of zeros it is 1
            return False
    return True


class _Logits(ReferenceEngine):
    """The reference, one row, which keeps the logits of a step: the draft's, then the base model's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[Tensor] = []
        self.ops = SimpleNamespace(**{**vars(REFERENCE), "lm_head_verify": self._kept})

    def _kept(
        self,
        x: Tensor,
        weight: Tensor,
        draft: Tensor,
        mask: Tensor | None,
        scale: Tensor | None,
        *,
        norm_weight: Tensor,
        norm_bias: Tensor,
        **choosing: Any,
    ) -> Any:
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        self.kept.append(REFERENCE.fused_linear(x, weight, scale=scale, **norm)[0, 0])
        return REFERENCE.lm_head_verify(x, weight, draft, mask, scale, **norm, **choosing)

    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        self._together(self._rule(k, draft, draft_tokens))


def _logits(values: DecoderWeights, shape: Shape, kv: str | None) -> tuple[Tensor, Tensor]:
    """Of the draft network and of the base model after the newest token [V], by the fp32 reference."""
    engine = _Logits(values, batch=1, **capacities(shape), kv=kv)
    begin(engine, shape)
    engine.step(1, True)
    draft, base = engine.kept
    return draft, base
