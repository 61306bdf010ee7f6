"""Cases timed in turn, round after round, each beside a bare read of as many bytes; and what a record says.

What else the machine does falls on all of them alike; the rounds' times stay in the record, so that two
records can be compared (kvspn.measure.comparison).
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from statistics import median
from typing import Any

import torch

from kvspn.measure import launches, machine
from kvspn.measure.intervals import halves_differ, of_median
from kvspn.weights.formats import FORMATS

_READ = 1 << 29  # bytes of the buffer read, far more than any cache
_BUSY = 0.1  # of the cores, used by others: a word about it is due

NOTES = {
    "above a read": "faster than torch's bare read of as many bytes, which is then no roof: the data lies "
    "nearer in the caches, more loads are in flight, or the bandwidth changed within a round",
    "above a product": "more operations a second than torch's product of matrices, which is then no roof",
    "halves differ": "the later half of the rounds took another time than the earlier, beyond their noise",
    "no interval": "too few rounds for an interval, or one that holds 0: the figure is not shown",
}
"""What a row's notes mean."""


@dataclass(frozen=True)
class Row:
    """One case: times in milliseconds; `bytes` and `flops` that it must at least take, and what follows.

    what: of a step: "step", a greedy step of one query row, or of two: a KVSPN step whose draft costs next to
        nothing; "kvspn_step", draft, verification and all; "draft", what is left of it without the two-row
        step of the same round; "token", a KVSPN step over the tokens that it yields. Of an op: its name and
        use, as in "fused_linear/qkv".
    shape, backend, weights: the backend is one of kvspn's, a peer, or another implementation of an op.
    rows: query rows that the base model takes.
    ms_interval: of the median, 95% by rank (kvspn.measure.intervals); None with fewer than six rounds.
    gb_per_s and what else is derived from a time: None where a difference ("draft") is not surely above 0.
    percent_of_measured_peak: the time of a bare read of as many bytes over that of the case, the median of
        the rounds' ratios; peak_interval is its own.
    launches: calls of the engine; on a GPU, of kernels, graphs and copies. None for a peer that is many.
    allocations: of memory, by one such call; None where they cannot be counted.
    correct: the fp32 reference's logits, within what the weight format explains (kvspn.measure.correctness);
        kvspn's also: the same tokens from KVSPN at k = 1 as from plain steps. An op's: as exact as the plain
        formula in the same dtype, against float64.
    device: "cpu" or "cuda". cache: "warm", or "cold", emptied before each timing.
    percent_of_measured_compute: gflop_per_s over that of torch's matrix product in the weights' format, bf16
        for integers.
    host_synchronisations: of a call, on a GPU; None elsewhere.
    ms, read_ms: of each round, the case and the bare read.
    kv: "int8" for int8 caches; None for those of the embeddings' dtype, a peer's, and for ops.
    tokens_per_step, tokens_per_step_of: of a "token" row, what it divides by, and whose figure that is:
        "given", or "miniature".
    notes: of NOTES, what a reader must know about the figures.
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
    gb_per_s: float | None
    percent_of_measured_peak: float | None
    launches: int | None
    allocations: int | None
    correct: bool
    device: str
    cache: str
    flops: int
    gflop_per_s: float | None
    percent_of_measured_compute: float | None
    host_synchronisations: int | None
    ms: list[float]
    read_ms: list[float]
    kv: str | None = None
    ms_interval: tuple[float, float] | None = None
    peak_interval: tuple[float, float] | None = None
    tokens_per_step: float | None = None
    tokens_per_step_of: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(eq=False, kw_only=True)
class Case:
    """What becomes a Row; ``time`` runs it once and returns its milliseconds, None if others' times tell."""

    what: str
    shape: str
    backend: str
    weights: str
    batch: int
    rows: int
    kv_length: int
    bytes: int
    flops: int
    correct: bool
    launches: int | None
    host_synchronisations: int | None = None
    allocations: int | None = None
    device: str = "cpu"
    cache: str = "warm"
    kv: str | None = None
    tokens_per_step: float | None = None
    tokens_per_step_of: str | None = None
    time: Callable[[], float] | None = None
    times: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)

    def row(self) -> Row:
        middle = median(self.times)
        interval = of_median(self.times)
        sure = min(self.times) > 0 if self.time else interval is not None and interval[0] > 0
        rate = self.flops / middle / 1e6 if sure else None
        shares = [100 * read / ms for read, ms in zip(self.reads, self.times, strict=True) if ms > 0]
        share = median(shares) if sure else None
        compute = None if rate is None else 100 * rate / median(self.products)
        notes = {
            "above a read": share is not None and share > 100,
            "above a product": compute is not None and compute > 100,
            "halves differ": halves_differ(self.times),
            "no interval": not sure,
        }
        return Row(
            what=self.what,
            shape=self.shape,
            backend=self.backend,
            weights=self.weights,
            batch=self.batch,
            rows=self.rows,
            kv_length=self.kv_length,
            ms_median=round(middle, 6),
            ms_min=round(min(self.times), 6),
            ms_max=round(max(self.times), 6),
            bytes=self.bytes,
            gb_per_s=round(self.bytes / middle / 1e6, 1) if sure else None,
            percent_of_measured_peak=_rounded(share, 1),
            launches=self.launches,
            allocations=self.allocations,
            correct=self.correct,
            device=self.device,
            cache=self.cache,
            flops=self.flops,
            gflop_per_s=_rounded(rate, 3),
            percent_of_measured_compute=_rounded(compute, 2),
            host_synchronisations=self.host_synchronisations,
            ms=[round(each, 6) for each in self.times],
            read_ms=[round(each, 6) for each in self.reads],
            kv=self.kv,
            ms_interval=interval and (round(interval[0], 6), round(interval[1], 6)),
            peak_interval=_interval(shares) if sure else None,
            tokens_per_step=self.tokens_per_step,
            tokens_per_step_of=self.tokens_per_step_of,
            notes=tuple(name for name, holds in notes.items() if holds),
        )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _interval(values: Sequence[float], digits: int = 1) -> tuple[float, float] | None:
    interval = of_median(values)
    return interval and (round(interval[0], digits), round(interval[1], digits))


class Rounds:
    """Times cases in turn, and keeps what the machine did meanwhile."""

    def __init__(self, count: int, cold: bool = False) -> None:
        self._count, self._cold = count, cold
        self._reads: dict[str, list[float]] = {}
        self._products: dict[str, dict[str, list[float]]] = {}
        self._elsewhere = machine.Elsewhere()

    def time(self, cases: Sequence[Case]) -> None:
        """Fills in their times, those of their bare reads, and the rates of matrix products."""
        reads: dict[tuple[str, int], list[float]] = {}
        products: dict[tuple[str, str], list[float]] = {}
        for case in cases:
            reads.setdefault((case.device, _READ), [])
            case.reads = reads.setdefault((case.device, case.bytes), [])
            case.products = products.setdefault((case.device, _multiplied(case.weights)), [])
        for _ in range(self._count):
            for (device, size), times in reads.items():
                times.append(read_milliseconds(size, device, self._cold))
            for (device, fmt), rates in products.items():
                rates.append(product_gflop_per_s(fmt, device))
            for case in cases:
                if case.time:
                    time.sleep(0.02)  # the threads of the one before may still spin
                    case.times.append(case.time())
        for (device, size), times in reads.items():
            if size == _READ:
                self._reads.setdefault(device, []).extend(times)
        for (device, fmt), rates in products.items():
            self._products.setdefault(device, {}).setdefault(fmt, []).extend(rates)

    def machine(self) -> dict[str, Any]:
        """The "machine" of docs/benchmark.md."""
        rates = {device: round(_READ / median(times) / 1e6, 1) for device, times in self._reads.items()}
        names = {"cpu": machine.cpu()["model"]}
        if "cuda" in rates:
            names["cuda"] = torch.cuda.get_device_name()
        return {
            "read_gb_per_s": next(iter(rates.values())),
            "read_gb_per_s_interval": _interval(
                [_READ / ms / 1e6 for ms in next(iter(self._reads.values()))]
            ),
            "cores_busy_elsewhere": self._elsewhere.cores(),
            "cpu": machine.cpu(),
            "memory_gib": machine.memory_gib(),
            "versions": machine.versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "devices": {
                device: {
                    "name": names[device],
                    "read_gb_per_s": rate,
                    "product_gflop_per_s": {
                        fmt: round(median(products), 1) for fmt, products in self._products[device].items()
                    },
                }
                for device, rate in rates.items()
            },
        }


def warnings(rows: Sequence[Row], measured: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures of some rows: one sentence each."""
    found = []
    busy, cores = measured["cores_busy_elsewhere"], measured["cpu"]["cores"]
    if busy is not None and busy > _BUSY * cores:
        found.append(
            f"other programs kept {busy:.1f} of the {cores} cores busy: these times are theirs as well"
        )
    unsteady = sum("halves differ" in row.notes for row in rows)
    if unsteady:
        found.append(f"the two halves of the run disagree in {unsteady} of {len(rows)} rows: measure again")
    return found


def clock(
    call: Callable[[], object], reset: Callable[[], object], device: str = "cpu", cold: bool = False
) -> Callable[[], float]:
    """What times a call in milliseconds, after an untimed one that wakes threads and caches.

    reset: before each of the two. cold: the caches are emptied between them.
    """

    def milliseconds() -> float:
        for last in (False, True):
            reset()
            if cold and last:
                _buffer(device).sum()
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            seconds = time.perf_counter() - begin
        return seconds * 1e3

    return milliseconds


def counts(call: Callable[[], object], device: str) -> dict[str, int | None]:
    """``launches`` and ``host_synchronisations`` of a call; on a CPU it is one, and nothing is waited for."""
    return launches.count(call) if device == "cuda" else {"launches": 1, "host_synchronisations": None}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read_milliseconds(size: int, device: str = "cpu", cold: bool = False) -> float:
    """A bare read of ``size`` bytes by torch's sum, from the cache if they fit there and it is not cold.

    More than the buffer holds, half a gigabyte, count in proportion.
    """
    values = _buffer(device)[: max(size // 4, 1)]
    return clock(values.sum, lambda: None, device, cold)() * size / values.nbytes


def read_gb_per_s(device: str = "cpu") -> float:
    """Reading bandwidth now, from memory."""
    return _READ / read_milliseconds(_READ, device) / 1e6


@cache
def _buffer(device: str) -> torch.Tensor:
    """On the CPU in huge pages where the system grants them."""
    if device != "cpu":
        return torch.ones(_READ // 4, device=device)
    memory = mmap.mmap(-1, _READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def _multiplied(fmt: str) -> str:
    """The format whose matrix product a weight format is judged by: activations are floats."""
    return FORMATS[fmt.partition("/")[0]].floats


def product_gflop_per_s(fmt: str, device: str = "cpu") -> float:
    """The rate of torch's product of two square matrices now: the compute peak to judge by."""
    matrix = _matrix(fmt, device)
    return 2 * len(matrix) ** 3 / clock(lambda: matrix @ matrix, lambda: None, device)() / 1e6


@cache
def _matrix(fmt: str, device: str) -> torch.Tensor:
    size = 4096 if device == "cuda" else 256  # larger ones are slower in some builds of torch
    return torch.ones(size, size, dtype=FORMATS[fmt].dtype, device=device)
