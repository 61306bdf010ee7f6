"""The decoder step, timed on every backend and weight format, each with a correctness check beside it.

All cases of a shape are timed in turn, round after round, with the machine's reading bandwidth measured in
every round too: what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from kvspn.engines import Engine, engine
from kvspn.ops import DecoderWeights
from kvspn.ops.weights import Linear
from kvspn.quantisation import quantise
from kvspn.random_decoder import random_decoder


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
            positions=448,
        )


SHAPES = {
    "whisperM2M": Shape(12, 3, 16, 4096, 51865, 1500, 64),
    "miniature": Shape(4, 2, 3, 768, 1500, 300, 32),
}


@dataclass(frozen=True)
class Row:
    """One case: times in milliseconds; `bytes` that a step must at least read, and what follows from it.

    what: "step", a plain greedy step of one row; "kvspn_step", draft, verification and all.
    correct: in fp32 the reference backend's token; in every format the same tokens from KVSPN at k = 1 as
        from plain steps.
    """

    what: str
    shape: str
    backend: str
    weights: str
    batch: int
    kv_length: int
    ms_median: float
    ms_min: float
    ms_max: float
    bytes: int
    gb_per_s: float
    percent_of_measured_peak: float
    correct: bool


def run(
    shapes: Sequence[str],
    backends: Sequence[str],
    formats: Sequence[str],
    rounds: int = 20,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times the cases. Returns {"machine": {"read_gb_per_s", "threads"}, "rows": [...], "summary": {...}};
    summary: draft_overhead of every shape, backend and format: a KVSPN step over a plain one of the same
    round, minus 1, the median."""
    rows: list[Row] = []
    bandwidth: list[float] = []
    overheads: dict[str, float] = {}
    for shape in shapes:
        made = SHAPES[shape].weights()
        cases: list[_Case] = []
        for fmt in formats:
            weights = quantise(made, fmt)
            for backend in backends:
                progress(f"{shape}: {backend}, {fmt}")
                cases += _cases(shape, weights, backend, fmt)
        progress(f"{shape}: timing")
        for _ in range(rounds):
            bandwidth.append(read_gb_per_s())
            time.sleep(0.05)  # torch's threads spin for a while after their work
            for case in cases:
                case.time()
        peak = median(bandwidth[-rounds:])
        rows += [case.row(peak) for case in cases]
        for plain, kvspn in zip(cases[::2], cases[1::2], strict=True):
            ratios = [ours / base for base, ours in zip(plain.times, kvspn.times, strict=True)]
            overheads[plain.name] = round(median(ratios) - 1, 3)
        del cases, weights
        gc.collect()
    return {
        "machine": {"read_gb_per_s": round(median(bandwidth), 1), "threads": torch.get_num_threads()},
        "rows": rows,
        "summary": {"draft_overhead": overheads},
    }


def read_gb_per_s(size: int = 1 << 28) -> float:
    """Reading bandwidth as torch's sum reaches it now."""
    values = _buffer(size)
    start = time.perf_counter()
    values.sum()
    return size / (time.perf_counter() - start) / 1e9


_BUFFER: list[torch.Tensor] = []


def _buffer(size: int) -> torch.Tensor:
    if not _BUFFER:
        _BUFFER.append(torch.ones(size // 4))
    return _BUFFER[0]


def step_bytes(weights: DecoderWeights, shape: Shape, batch: int, draft: bool) -> int:
    """Weights once, each row's keys and values once; with a draft, its weights and its group reads too."""
    parts: list[Any] = [layer._replace(cross_kv=Linear(weights.embed_tokens[:0])) for layer in weights.layers]
    parts += [(weights.norm, weights.head)]
    positions = shape.layers * (shape.length + shape.encoder_positions)
    if draft:
        parts += [*weights.blocks, (weights.draft_norm, weights.draft_output)]
        positions += shape.layers * shape.length + shape.groups * shape.encoder_positions
    kv = 2 * positions * shape.width * weights.embed_tokens.element_size()
    tensors = [tensor for part in parts for piece in part if piece for tensor in piece if tensor is not None]
    return batch * kv + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Case:
    """One kind of step on one engine."""

    def __init__(self, engine: Engine, draft: bool, fields: dict[str, Any], length: int) -> None:
        self._engine, self._draft, self._fields, self._length = engine, draft, fields, length
        self.times: list[float] = []
        self.name = f"{fields['shape']}/{fields['backend']}/{fields['weights']}"

    def time(self) -> None:
        """One step, after an untimed one that wakes threads and caches."""
        for _ in range(2):
            self._engine.lengths.fill_(self._length)
            self._engine.finished.fill_(False)
            start = time.perf_counter()
            self._engine.step(1, self._draft)
            milliseconds = (time.perf_counter() - start) * 1e3
        self.times.append(milliseconds)

    def row(self, peak: float) -> Row:
        gb_per_s = self._fields["bytes"] / median(self.times) / 1e6
        return Row(
            **self._fields,
            ms_median=round(median(self.times), 3),
            ms_min=round(min(self.times), 3),
            ms_max=round(max(self.times), 3),
            gb_per_s=round(gb_per_s, 1),
            percent_of_measured_peak=round(100 * gb_per_s / peak, 1),
        )


def _cases(name: str, weights: DecoderWeights, backend: str, fmt: str) -> Iterator[_Case]:
    """A plain step and a KVSPN step, on one engine."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape.encoder_positions, shape.width, generator=generator)
    prompt = torch.randint(shape.vocabulary, (shape.length + 1,), generator=generator).tolist()

    def start(backend: str) -> Engine:
        capacity = shape.length + 8
        e = engine(backend, weights, batch=1, capacity=capacity, cross_capacity=shape.encoder_positions)
        e.start([states], [prompt], eos=-1, max_length=capacity)
        return e

    def tokens(e: Engine, draft: bool) -> list[int]:
        e.lengths.fill_(shape.length)
        for _ in range(3):
            e.step(1, draft)
        return e.tokens[0, : shape.length + 4].tolist()

    e = start(backend)
    plain = tokens(e, draft=False)
    correct = tokens(e, draft=True) == plain
    if fmt == "fp32" and backend != "reference":
        reference = start("reference")
        reference.step(1, draft=False)
        correct &= reference.tokens[0, shape.length + 1].item() == plain[shape.length + 1]
        del reference
    for draft in (False, True):
        fields = {
            "what": "kvspn_step" if draft else "step",
            "shape": name,
            "backend": backend,
            "weights": fmt,
            "batch": 1,
            "kv_length": shape.length,
            "bytes": step_bytes(weights, shape, 1, draft),
            "correct": correct,
        }
        yield _Case(e, draft, fields, shape.length)
