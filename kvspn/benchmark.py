"""The decoder step, timed on every backend and weight format, each with a correctness check beside it.

Everything in one weight format is timed in turn, round after round, the peers too, and in every round a bare
read of as many bytes: what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from kvspn import allocations, machine, quantisation
from kvspn.engines import Engine, engine
from kvspn.ops import DecoderWeights
from kvspn.ops.weights import Linear
from kvspn.peers import PEERS, Problem, Skipped, load
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
UNPRUNED = {"whisperM2M": ("whisper-medium", replace(SHAPES["whisperM2M"], layers=24))}

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
_RECORD = Path(__file__).parents[1] / "bench/results/miniature.json"
_READ = 1 << 29  # bytes of the buffer read, far more than any cache


@dataclass(frozen=True)
class Row:
    """One case: times in milliseconds; `bytes` that it must at least read, and what follows from it.

    what: "step", a greedy step of one query row, or of two: a KVSPN step whose draft costs next to nothing;
        "kvspn_step", draft, verification and all; "draft", what is left of it without the two-row step of
        the same round; "token", a KVSPN step over the tokens that it yields.
    shape, backend, weights: the backend is one of kvspn's, or a peer.
    rows: query rows that the base model takes.
    percent_of_measured_peak: the time of a bare read of as many bytes, over that of the step.
    launches: calls of the engine; None for a peer that is many.
    allocations: of memory, by one such call; None where they cannot be counted.
    correct: in fp32 the reference backend's token; in every format the same tokens from KVSPN at k = 1 as
        from plain steps. A peer's: the reference's logits, within what its weight format explains.
    kv: "int8" for int8 caches; None for those of the embeddings' dtype, and a peer's.
    """

    what: str
    shape: str
    backend: str
    weights: str
    batch: int
    rows: int
    kv_length: int
    ms_median: float
    ms_min: float
    ms_max: float
    bytes: int
    gb_per_s: float
    percent_of_measured_peak: float
    launches: int | None
    allocations: int | None
    correct: bool
    kv: str | None = None


@dataclass(eq=False)
class _Case:
    """What becomes a Row; ``time`` takes one step and returns its milliseconds, None if others' tell them."""

    what: str
    backend: str
    weights: str
    rows: int
    bytes: int
    correct: bool
    launches: int | None
    allocations: int | None
    time: Callable[[], float] | None = None
    kv: str | None = None
    times: list[float] = field(default_factory=list)

    def row(self, name: str, shape: Shape, read_ms: float) -> Row:
        middle = median(self.times)
        return Row(
            what=self.what,
            shape=name,
            backend=self.backend,
            weights=self.weights,
            batch=1,
            rows=self.rows,
            kv_length=shape.length,
            ms_median=round(middle, 4),
            ms_min=round(min(self.times), 4),
            ms_max=round(max(self.times), 4),
            bytes=self.bytes,
            gb_per_s=round(self.bytes / middle / 1e6, 1),
            percent_of_measured_peak=round(100 * read_ms / middle, 1),
            launches=self.launches,
            allocations=self.allocations,
            correct=self.correct,
            kv=self.kv,
        )


def run(
    shapes: Sequence[str],
    backends: Sequence[str],
    formats: Sequence[str],
    rounds: int = 20,
    peers: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    skipped: Callable[[str], None] = lambda text: None,
    kv: str | None = None,
) -> dict[str, Any]:
    """Times the cases: {"machine", "rows", "summary"} of docs/benchmark.md, with a list of Row.

    Args:
        shapes: of SHAPES.
        backends: of kvspn.
        formats: of kvspn.quantisation.formats; a peer has the base model's, once.
        rounds: timings of each case.
        peers: of PEERS.
        progress: told what is going on.
        skipped: told what is left out, and why.
        kv: "int8" for int8 caches in kvspn's steps.

    Raises:
        ValueError: another format.
    """
    bench = _Bench(rounds, progress, skipped)
    modules = {}
    for peer in peers:
        try:
            modules[peer] = load(peer)
        except Skipped as reason:
            skipped(str(reason))
    widths: dict[str, list[str]] = {}
    for fmt in formats:
        widths.setdefault(_width(fmt), []).append(fmt)
    for name in shapes:
        shape = SHAPES[name]
        progress(f"{name}: random weights")
        made = shape.weights()
        problem = Problem(made, shape.length, shape.encoder_positions) if modules else None
        for width, ours in widths.items():
            cases: list[_Case] = []
            for fmt in ours:
                for backend in backends:
                    progress(f"{name}: {backend}, {fmt}")
                    cases += _own_cases(shape, made, backend, fmt, kv, bench.tokens_per_step)
            cases += bench.peer_cases(modules, problem, shape, width)
            bench.time(name, shape, cases)
        del made, problem, cases
    for name in shapes:  # last, since they need the most memory
        if name in UNPRUNED and "transformers" in modules and "fp32" in widths:
            name, shape = UNPRUNED[name]
            progress(f"{name}: random weights")
            problem = Problem(shape.weights(), shape.length, shape.encoder_positions)
            transformers = {"transformers": modules["transformers"]}
            bench.time(name, shape, bench.peer_cases(transformers, problem, shape, "fp32"))
    return bench.document()


class _Bench:
    """The rows so far, and what they are measured with."""

    def __init__(self, rounds: int, progress: Callable[[str], None], skipped: Callable[[str], None]) -> None:
        self._rounds, self._progress, self._skipped = rounds, progress, skipped
        self._reads: list[float] = []
        self._rows: list[Row] = []
        self._costs: dict[str, dict[str, float]] = {"two_row_cost": {}, "draft_overhead": {}}
        self.tokens_per_step = _tokens_per_step()

    def peer_cases(
        self, modules: dict[str, ModuleType], problem: Problem | None, shape: Shape, fmt: str
    ) -> Iterator[_Case]:
        for peer, module in modules.items():
            if problem is None or fmt not in module.FORMATS:
                continue
            self._progress(f"{peer}, {fmt}")
            try:
                yield from _peer_cases(peer, module, problem, shape, fmt)
            except Skipped as reason:
                self._skipped(str(reason))

    def time(self, name: str, shape: Shape, cases: Iterable[_Case]) -> None:
        """All of them in turn, round after round."""
        cases = list(cases)
        self._progress(f"{name}: timing")
        reads: dict[int, list[float]] = {size: [] for size in (_READ, *(case.bytes for case in cases))}
        for _ in range(self._rounds):
            for size, times in reads.items():
                times.append(read_milliseconds(size))
            for case in cases:
                if case.time:
                    time.sleep(0.02)  # the threads of the one before may still spin
                    case.times.append(case.time())
        self._reads += reads[_READ]
        self._derive(name, cases)
        self._rows += [case.row(name, shape, median(reads[case.bytes])) for case in cases]

    def _derive(self, name: str, cases: list[_Case]) -> None:
        """The times of cases that follow from others', and the ratios, round by round."""
        of = {(case.backend, case.weights, case.what, case.rows): case.times for case in cases}
        for case in cases:
            if case.what not in ("draft", "token"):
                continue
            one, two, whole = (
                of[case.backend, case.weights, what, rows]
                for what, rows in (("step", 1), ("step", 2), ("kvspn_step", 2))
            )
            if case.what == "token":
                assert self.tokens_per_step
                case.times = [ms / self.tokens_per_step for ms in whole]
            else:
                case.times = [a - b for a, b in zip(whole, two, strict=True)]
                key = f"{name}/{case.backend}/{case.weights}"
                self._costs["two_row_cost"][key] = _ratio(two, one)
                self._costs["draft_overhead"][key] = round(_ratio(whole, one) - 1, 3)

    def document(self) -> dict[str, Any]:
        return {
            "machine": {
                "read_gb_per_s": round(_READ / median(self._reads) / 1e6, 1),
                "cpu": machine.cpu(),
                "memory_gib": machine.memory_gib(),
                "versions": machine.versions(),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            "rows": self._rows,
            "summary": {
                **self._costs,
                "tokens_per_step": self.tokens_per_step,
                "speedup": speedups(self._rows),
            },
        }


def speedups(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each of kvspn's steps and tokens: the fastest correct peer of the same weight width, and the ratios.

    A token is compared with a peer's step of one row, which yields one.
    """
    found: dict[str, dict[str, Any]] = {}
    for ours in rows:
        if ours.backend in PEERS or ours.what not in ("step", "token"):
            continue
        token = ours.what == "token"
        count = 1 if token else ours.rows
        peers = [row for row in rows if row.backend in PEERS and row.correct and row.rows == count]
        compared: dict[str, Any] = {}
        same = [row for row in peers if (row.shape, row.weights) == (ours.shape, _width(ours.weights))]
        if same:
            fastest = min(same, key=lambda row: row.ms_median)
            compared["fastest_peer"] = fastest.backend
            compared["over_fastest_peer"] = round(fastest.ms_median / ours.ms_median, 3)
        unpruned, _ = UNPRUNED.get(ours.shape, (None, None))
        for row in peers:
            if (row.backend, row.weights) == ("transformers", "fp32") and row.shape in (ours.shape, unpruned):
                which = "whisper_medium" if row.shape == unpruned else "transformers"
                compared[f"over_{which}_fp32"] = round(row.ms_median / ours.ms_median, 3)
        if compared:
            what = "token" if token else f"step_{ours.rows}"
            found.setdefault(f"{ours.shape}/{ours.backend}/{ours.weights}", {})[what] = compared
    return found


def step_bytes(weights: DecoderWeights, shape: Shape, batch: int, draft: bool, kv: str | None = None) -> int:
    """Weights once, each row's keys and values once; with a draft, its weights and its group reads too."""
    parts: list[Any] = [layer._replace(cross_kv=Linear(weights.embed_tokens[:0])) for layer in weights.layers]
    parts += [(weights.norm, weights.head)]
    if draft:
        parts += [*weights.blocks, (weights.draft_norm, weights.draft_output)]
    # Each head's int8 values at a position have an fp32 scale.
    each = weights.embed_tokens.element_size() if kv is None else 1 + 4 / shape.head_dim
    cached = round(_cached(shape, draft) * each)
    tensors = [tensor for part in parts for piece in part if piece for tensor in piece if tensor is not None]
    return batch * cached + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cached(shape: Shape, draft: bool) -> int:
    """Values of the caches that a step reads for a row."""
    positions = shape.layers * (shape.length + shape.encoder_positions)
    if draft:
        positions += shape.layers * shape.length + shape.groups * shape.encoder_positions
    return 2 * positions * shape.width


def start(backend: str, weights: DecoderWeights, shape: Shape, kv: str | None = None) -> Engine:
    """An engine of one row before its next step, ``shape.length`` positions in the cache."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape.encoder_positions, shape.width, generator=generator)
    prompt = torch.randint(shape.vocabulary, (shape.length + 1,), generator=generator).tolist()
    capacity = shape.length + 8
    positions = shape.encoder_positions
    made = engine(backend, weights, batch=1, capacity=capacity, cross_capacity=positions, kv=kv)
    made.start([states], [prompt], eos=-1, max_length=capacity)
    return made


def _own_cases(
    shape: Shape,
    made: DecoderWeights,
    backend: str,
    fmt: str,
    kv: str | None,
    tokens_per_step: float | None,
) -> Iterator[_Case]:
    weights = quantisation.quantise(made, fmt)
    whole, two_row = (start(backend, each, shape, kv) for each in (weights, _faint_draft(weights)))

    def tokens(engine: Engine, draft: bool) -> list[int]:
        engine.lengths.fill_(shape.length)
        for _ in range(3):
            engine.step(1, draft)
        found: list[int] = engine.tokens[0, : shape.length + 4].tolist()
        return found

    plain = tokens(whole, draft=False)
    correct = plain == tokens(whole, draft=True) == tokens(two_row, draft=True)
    if fmt == "fp32" and backend != "reference":
        reference = start("reference", weights, shape, kv)
        reference.step(1, draft=False)
        correct &= reference.tokens[0, shape.length + 1].item() == plain[shape.length + 1]

    def timed(engine: Engine, draft: bool) -> Callable[[], float]:
        def milliseconds() -> float:
            for _ in range(2):  # the first wakes threads and caches
                engine.lengths.fill_(shape.length)
                engine.finished.fill_(False)
                begin = time.perf_counter()
                engine.step(1, draft)
                seconds = time.perf_counter() - begin
            return seconds * 1e3

        return milliseconds

    plain_allocations, kvspn_allocations = allocations.count(shape.layers, shape.groups, backend, fmt, kv)
    bare, drafting = (step_bytes(weights, shape, 1, draft, kv) for draft in (False, True))

    def case(what: str, rows: int, size: int, time: Callable[[], float] | None = None) -> _Case:
        counted = plain_allocations if (what, rows) == ("step", 1) else kvspn_allocations
        return _Case(what, backend, fmt, rows, size, correct, 1, counted, time, kv)

    yield case("step", 1, bare, timed(whole, False))
    yield case("step", 2, bare, timed(two_row, True))
    yield case("kvspn_step", 2, drafting, timed(whole, True))
    yield case("draft", 1, drafting - bare)
    if tokens_per_step:
        yield case("token", 2, round(drafting / tokens_per_step))


def _faint_draft(weights: DecoderWeights) -> DecoderWeights:
    """The same decoder with a draft network of next to no cost: a small block, one word to choose from."""
    like = weights.embed_tokens
    block = weights.blocks[0]._replace(
        fc1=Linear(like.new_zeros(16, like.shape[1])),
        fc2=Linear(like.new_zeros(like.shape[1], 16)),
        cross_norm=None,
        cross_q=None,
        cross_out=None,
    )
    return replace(
        weights,
        blocks=(block,),
        groups=1,
        last_layer_only=True,
        draft_head=Linear(like[:1].clone()),
        draft_ids=torch.zeros(1, dtype=torch.int32),
    )


def _peer_cases(peer: str, module: ModuleType, problem: Problem, shape: Shape, fmt: str) -> Iterator[_Case]:
    step = module.prepare(problem, fmt)
    fp32 = step_bytes(problem.weights, replace(shape, length=0, encoder_positions=0), 1, False)
    size = round(fp32 / 4 * WEIGHT_BYTES[fmt]) + _cached(shape, False) * module.FORMATS[fmt]
    for rows in module.ROWS:
        _, logits = step(rows)
        correct = problem.correct(logits, fmt)

        def milliseconds(rows: int = rows) -> float:
            taken: float = step(rows)[0]
            return taken

        yield _Case("step", peer, fmt, rows, size, correct, module.LAUNCHES, None, milliseconds)


def _tokens_per_step() -> float | None:
    """What the shipped miniature reaches on unseen sentences at k = 1; None where its record is not here."""
    if not _RECORD.exists():
        return None
    rows = json.loads(_RECORD.read_text("utf-8"))["rows"]
    found: float = next(row["tokens_per_step"] for row in rows if (row["set"], row["k"]) == ("unseen", 1))
    return found


def _width(fmt: str) -> str:
    """The base model's of a format for each network."""
    return quantisation.formats(fmt)[0]


def _ratio(over: list[float], under: list[float]) -> float:
    return round(median(a / b for a, b in zip(over, under, strict=True)), 3)


@cache
def _buffer() -> torch.Tensor:
    """In huge pages where the system grants them."""
    memory = mmap.mmap(-1, _READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def read_milliseconds(size: int) -> float:
    """A bare read of ``size`` bytes by torch's sum, from the cache if they fit there.

    More than the buffer holds, half a gigabyte, count in proportion.
    """
    values = _buffer()[: size // 4]
    for _ in range(2):
        begin = time.perf_counter()
        values.sum()
        seconds = time.perf_counter() - begin
    return seconds * 1e3 * size / values.nbytes


def read_gb_per_s() -> float:
    """Reading bandwidth now, from memory."""
    return _READ / read_milliseconds(_READ) / 1e6
