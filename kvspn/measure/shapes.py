"""The shapes at which things are measured, and engines ready to be measured at them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvspn.engines import Engine, engine
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder

_ROOM = 8  # tokens that an engine can still take


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
    positions: int = 448

    @property
    def max_length(self) -> int:
        """The largest T at which steps can be measured."""
        return self.positions - _ROOM

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
            positions=self.positions,
            short_list=self.short_list,
            encoder_stride=self.encoder_stride,
        )


SHAPES = {
    "whisperM2M": Shape(12, 3, 16, 4096, 51865, 1500, 64),
    "miniature": Shape(4, 2, 3, 768, 1500, 300, 32),
}
UNPRUNED = {"whisperM2M": ("whisper-medium", replace(SHAPES["whisperM2M"], layers=24))}


def shape_of(weights: DecoderWeights, encoder_positions: int) -> Shape:
    """That of a decoder whose draft network is there, T a tenth of its positions.

    Raises:
        ValueError: no draft network.
    """
    if not weights.blocks:
        raise ValueError("weights must have draft blocks, got none")
    positions, width = weights.positions, weights.embed_tokens.shape[1]
    return Shape(
        layers=len(weights.layers),
        groups=weights.groups,
        heads=weights.heads,
        ffn=len(weights.layers[0].fc1.weight),
        vocabulary=len(weights.embed_tokens),
        encoder_positions=encoder_positions,
        length=max(positions // 10, 1),
        head_dim=width // weights.heads,
        short_list=0 if weights.draft_ids is None else len(weights.draft_ids),
        encoder_stride=weights.encoder_stride,
        positions=positions,
    )


_PARTS = ("d", "layers", "heads", "vocab", "ffn", "groups", "encoder", "positions", "T")


def parse_shape(text: str) -> Shape:
    """ "d=1280,layers=4,heads=20,vocab=51866" -> a shape; also ffn, groups, encoder, positions and T.

    What is not said: heads 64 wide, a vocabulary of 51,865, ffn of 4 d, the most groups up to 3 that divide
    the layers, 1,500 encoder positions, 448 of the decoder and T = 64.

    Raises:
        ValueError: d or layers missing, another name, what is not a whole number from 1, or does not divide.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in _PARTS or not number.isdecimal() or not 1 <= int(number) <= 1 << 24:
            raise ValueError(f"shape must be of {', '.join(_PARTS)}, each with a number from 1; got {part!r}")
        given[name] = int(number)
    if missing := [name for name in ("d", "layers") if name not in given]:
        raise ValueError(f"shape must say {' and '.join(missing)}; got {text!r}")
    d, layers = given["d"], given["layers"]
    heads = given.get("heads", max(d // 64, 1))
    groups = given.get("groups", next(n for n in (3, 2, 1) if layers % n == 0))
    for whole, name, divisor in (("d", "heads", heads), ("layers", "groups", groups)):
        if given[whole] % divisor:
            raise ValueError(f"shape must have {name} that divide {whole}={given[whole]}; got {divisor}")
    shape = Shape(
        layers=layers,
        groups=groups,
        heads=heads,
        ffn=given.get("ffn", 4 * d),
        vocabulary=given.get("vocab", 51865),
        encoder_positions=given.get("encoder", 1500),
        length=given.get("T", 64),
        head_dim=d // heads,
        positions=given.get("positions", 448),
    )
    if shape.length > shape.max_length:
        raise ValueError(
            f"shape must have T up to positions - {_ROOM}={shape.max_length}; got {shape.length}"
        )
    return shape


def find_shapes(text: str) -> dict[str, Shape]:
    """ "whisperM2M,miniature", or one of your own as :func:`parse_shape` reads it -> shapes by name.

    Raises:
        ValueError: neither.
    """
    if "=" in text:
        return {text.replace(" ", ""): parse_shape(text)}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SHAPES:
            raise ValueError(
                f"shape must be of {', '.join(SHAPES)}, or your own as in d=1280,layers=4; got {name!r}"
            )
    return {name: SHAPES[name] for name in names}


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


def begin(engine: Engine, shape: Shape, mask: torch.Tensor | None = None) -> Engine:
    """The engine before its next step, ``shape.length`` positions in the cache of each of its rows.

    mask: of the engine's start().
    """
    batch, capacity = engine.tokens.shape
    states, prompts = [], []
    for row in range(batch):
        generator = torch.Generator().manual_seed(row)
        states.append(torch.randn(shape.encoder_positions, shape.width, generator=generator))
        prompts.append(torch.randint(shape.vocabulary, (shape.length + 1,), generator=generator).tolist())
    device = engine.tokens.device
    engine.start([each.to(device) for each in states], prompts, eos=-1, max_length=capacity, mask=mask)
    return engine
