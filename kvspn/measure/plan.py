"""What a step consists of, before it runs: its stages, and the bytes that each must read."""

from __future__ import annotations

from typing import NamedTuple

from kvspn.engines import engine
from kvspn.engines.native import NativeEngine
from kvspn.measure.shapes import device_of
from kvspn.weights import DecoderWeights

BACKENDS = ("native", "cuda")  # whose step is a plan


class Stage(NamedTuple):
    """All stages of one name, as in kvspn.h: how many they are, and the bytes that they must read."""

    times: int
    bytes: int


def planned(engine: NativeEngine, draft: bool) -> dict[str, Stage]:
    """The stages of the engine's next step by name, in the order of their first."""
    stages: dict[str, Stage] = {}
    for name, size in engine.plan(draft):
        before = stages.get(name, Stage(0, 0))
        stages[name] = Stage(before.times + 1, before.bytes + size)
    return stages


def plan(
    weights: DecoderWeights,
    *,
    length: int,
    encoder_positions: int,
    draft: bool,
    backend: str = "native",
    kv: str | None = None,
) -> dict[str, Stage]:
    """The stages of a step of one row, by name; nothing runs.

    Args:
        length: T, positions in the self-attention cache, with room for a step behind them.
        encoder_positions: in the cross-attention cache.
        draft: whether the draft network takes part.
        backend: of BACKENDS.
        kv: as :func:`kvspn.engines.engine` takes it.

    Raises:
        ValueError: naming the argument.
    """
    longest = weights.positions - 2
    if not 1 <= length <= longest:
        raise ValueError(f"length must be 1 to {longest}, got {length}")
    made = engine(
        backend,
        weights.to(device_of(backend)),
        batch=1,
        capacity=length + 2,
        cross_capacity=encoder_positions,
        kv=kv,
    )
    if not isinstance(made, NativeEngine):
        raise ValueError(f"backend must be {' or '.join(BACKENDS)}, whose step is a plan; got {backend!r}")
    made.lengths.fill_(length)
    made.cache.cross_lengths.fill_(encoder_positions)
    made.finished.fill_(False)
    return planned(made, draft)
