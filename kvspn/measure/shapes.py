"""The shapes at which things are measured, and engines ready to be measured at them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvspn.engines import Engine, engine
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder

POSITIONS = 448  # of every shape's decoder
_ROOM = 8  # tokens that an engine can still take
MAX_LENGTH = POSITIONS - _ROOM


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, and the lengths at which it is measured."""

    layers: int
    groups: int
    heads: int
    ffn: int
    vocabulary: int
    encoder_positions: int
    length: int  # T, positions in the self-attention cache
    head_dim: int = 64
    short_list: int = 0  # tokens that the draft network chooses from; 0: all
    encoder_stride: int = 1  # of the positions that it attends to

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def weights(self) -> DecoderWeights:
        """Random ones, fp32."""
        return random_decoder(
            layers=self.layers,
            blocks=self.groups,
            heads=self.heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
            vocabulary=self.vocabulary,
            positions=POSITIONS,
            short_list=self.short_list,
            encoder_stride=self.encoder_stride,
        )


SHAPES = {
    "whisperM2M": Shape(12, 3, 16, 4096, 51865, 1500, 64),
    "miniature": Shape(4, 2, 3, 768, 1500, 300, 32),
}
UNPRUNED = {"whisperM2M": ("whisper-medium", replace(SHAPES["whisperM2M"], layers=24))}


def device_of(backend: str) -> str:
    """Where a backend's step is timed: "cuda", or "cpu", where emulators and interpreters run too."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def start(
    backend: str, weights: DecoderWeights, shape: Shape, batch: int = 1, kv: str | None = None
) -> Engine:
    """An engine of some rows before its next step, ``shape.length`` positions in each one's cache."""
    on_device = weights.to(device_of(backend))
    return begin(engine(backend, on_device, batch=batch, **capacities(shape), kv=kv), shape)


def capacities(shape: Shape) -> dict[str, int]:
    """Of an engine that :func:`begin` takes."""
    return {"capacity": shape.length + _ROOM, "cross_capacity": shape.encoder_positions}


def begin(engine: Engine, shape: Shape) -> Engine:
    """The engine before its next step, ``shape.length`` positions in the cache of each of its rows."""
    batch, capacity = engine.tokens.shape
    states, prompts = [], []
    for row in range(batch):
        generator = torch.Generator().manual_seed(row)
        states.append(torch.randn(shape.encoder_positions, shape.width, generator=generator))
        prompts.append(torch.randint(shape.vocabulary, (shape.length + 1,), generator=generator).tolist())
    device = engine.tokens.device
    engine.start([each.to(device) for each in states], prompts, eos=-1, max_length=capacity)
    return engine
