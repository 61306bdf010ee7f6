"""What long sequences cost in KV: the decoder step and the draft's attention at growing lengths.

The paper leaves open what its flattened sequence of layers x T keys costs past some 500 tokens
(arXiv 2508.11189). Here is the measurement, and the arithmetic of where the draft stops paying.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.engines import CachedEngine, engine
from kvspn.engines.native import NativeEngine
from kvspn.measure import machine
from kvspn.measure.intervals import of_median
from kvspn.measure.plan import planned
from kvspn.measure.shapes import find_shapes
from kvspn.measure.steps import miniature
from kvspn.measure.timing import read_gb_per_s, read_milliseconds, warnings
from kvspn.ops import K_INF, flat_kv_attention
from kvspn.ops.append_kv import quantise as quantise_kv
from kvspn.weights.formats import quantise
from kvspn.weights.random import random_decoder

LENGTHS = tuple(64 << i for i in range(9))  # 64 .. 16,384
STRIDE = 4  # of the thinned variants, past the newest positions
WINDOW = 64
_CHECK_STEPS = 12


@dataclass(frozen=True)
class Point:
    """One length T, batch 1; times are medians in milliseconds.

    step, kvspn_step: a plain greedy step; draft, verification of two rows and all.
    attention: by variant, one query over the cache of one group of layers (see VARIANTS).
    attention_bytes: keys and values that each variant reads, not counting copies it makes first.
    correct: every variant within bf16's rounding of the same keys' formula in fp32.
    intervals: of each median, 95% by rank: "step", "kvspn_step", "overhead", and attention's by its names.
    kv_bytes: self-attention cache of all layers at this length. overhead: kvspn_step / step - 1, the median
        of the rounds; it is also the acceptance at which KVSPN breaks even.
    """

    length: int
    step: float
    kvspn_step: float
    overhead: float
    attention: dict[str, float]
    attention_bytes: dict[str, int]
    kv_bytes: int
    correct: bool
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class Stage:
    """What one kind of stage takes of a step, all layers or blocks together; medians in milliseconds.

    step: "plain" or "KVSPN". name: as in kvspn.h; "draft...." is the draft network's.
    count: how often it comes. ms, interval: their sum, and 95% of its median (kvspn.measure.intervals).
    bytes: of weights, keys and values that it must read.
    percent_of_read: its share of a bare read of the whole step's bytes over its time; None without bytes.
    """

    step: str
    name: str
    count: int
    ms: float
    interval: tuple[float, float] | None
    bytes: int
    percent_of_read: float | None


@dataclass(frozen=True)
class Check:
    """A run of real steps at a length: its speedup over plain steps, and what the arithmetic says."""

    length: int
    k: str
    acceptance: float
    predicted: float
    measured: float


def acceptance() -> dict[str, float | None]:
    """Of drafts at k = 1 on the miniature, by variant; None where that variant's is not measured.

    Its utterances end within the window of the thinned ones.
    """
    found = {name: miniature(_RECORDS[name]) if name in _RECORDS else None for name in VARIANTS}
    return {name: figures["acceptance"] if figures else None for name, figures in found.items()}


def speedup(overhead: float, acceptance: float) -> float:
    """Of one-token drafting over plain decoding: 1 + acceptance tokens for 1 + overhead of the time."""
    return (1 + acceptance) / (1 + overhead)


class Keys(NamedTuple):
    """The cache of one group of layers, and what else a variant reads in its place."""

    kv: Tensor  # [n, 2, 1, H, S, D]
    int8: Tensor  # the same, and its scales [n, 2, 1, H, S]
    scale: Tensor
    pooled: Tensor  # [n, 2, 1, H, S / STRIDE, D]: means of neighbours

    @classmethod
    def of(cls, kv: Tensor) -> Keys:
        whole = kv[..., : kv.shape[4] // STRIDE * STRIDE, :]
        return cls(kv, *quantise_kv(kv), whole.unflatten(4, (-1, STRIDE)).mean(5))


def flattened(q: Tensor, keys: Keys, length: int) -> Tensor:
    """All layers' keys as one sequence, read where they lie."""
    return flat_kv_attention(q, keys.kv, _i32(length), False)


def concatenated(q: Tensor, keys: Keys, length: int) -> Tensor:
    """The same keys copied into one tensor first, then torch's scaled_dot_product_attention."""
    return _attend(q, _one_sequence(keys.kv[..., :length, :]))


def merged(q: Tensor, keys: Keys, length: int) -> Tensor:
    """Layer by layer, the results weighed by their softmax denominators."""
    outs, denominators = [], []
    for layer, values in keys.kv[..., :length, :]:
        scores = (q @ layer.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        denominators.append(scores.logsumexp(-1, keepdim=True))
        outs.append(scores.softmax(-1).to(q.dtype) @ values)
    weights = torch.stack(denominators).softmax(0).to(q.dtype)
    return (torch.stack(outs) * weights).sum(0).transpose(1, 2).flatten(2)


def last_layer(q: Tensor, keys: Keys, length: int) -> Tensor:
    """The group's last layer alone: an ablation of the paper's idea."""
    return flat_kv_attention(q, keys.kv[-1:], _i32(length), False)


def int8(q: Tensor, keys: Keys, length: int) -> Tensor:
    """All layers' keys in int8, with a scale for each head and position."""
    return flat_kv_attention(q, keys.int8, _i32(length), False, kv_scale=keys.scale)


def strided(q: Tensor, keys: Keys, length: int) -> Tensor:
    """The newest positions, copied together, and every fourth of the older ones, where it lies."""
    return _windowed(q, keys, keys.kv[..., ::STRIDE, :], length)


def pooled(q: Tensor, keys: Keys, length: int) -> Tensor:
    """The newest positions, copied together, and means of four of the older ones, kept beside the cache."""
    return _windowed(q, keys, keys.pooled, length)


def _windowed(q: Tensor, keys: Keys, thinned: Tensor, length: int) -> Tensor:
    older = _older(length)
    window = _one_sequence(keys.kv[..., older:length, :])
    return flat_kv_attention(
        q, thinned, _i32(older // STRIDE), False, tail=window, tail_lengths=_i32(window.shape[3])
    )


def _older(length: int) -> int:
    """Positions before the window of the newest, a multiple of STRIDE."""
    return max(length - WINDOW, 0) // STRIDE * STRIDE


def _one_sequence(kv: Tensor) -> Tensor:
    """[n, 2, B, H, T, D] -> [2, B, H, n * T, D]."""
    return kv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def _attend(q: Tensor, kv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, *kv).transpose(1, 2).flatten(2)


def _i32(length: int) -> Tensor:
    return torch.tensor([length], dtype=torch.int32)


_RECORDS = {"flattened": "", "concatenated": "", "merged": "", "last layer": "last-layer", "int8": "int8-kv"}

VARIANTS: dict[str, Callable[[Tensor, Keys, int], Tensor]] = {
    "flattened": flattened,
    "concatenated": concatenated,
    "merged": merged,
    "last layer": last_layer,
    "int8": int8,
    "strided": strided,
    "pooled": pooled,
}


def measure(
    lengths: Sequence[int] = LENGTHS,
    *,
    shape: str = "whisperM2M",
    weights: str = "bf16",
    backend: str = "native",
    rounds: int = 7,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Returns {"shape", "weights", "backend", "read_gb_per_s", "warnings", "points", "stages", "checks",
    "acceptance"}.

    That is lists of Point, Stage (of the native backend, at the first length) and Check, and
    :func:`acceptance`.

    Args:
        lengths: T, positions in the self-attention cache, each at least 1.
        shape: one, as kvspn.measure.shapes.find_shapes reads it. weights: a format (kvspn.weights.formats).
        backend: of the steps.
        rounds: timings of each case, in turn.
    """
    progress("making random weights")
    ((_, sizes),) = find_shapes(shape).items()
    elsewhere = machine.Elsewhere()
    longest = max(lengths) + 2 * _CHECK_STEPS + 2
    made = random_decoder(
        layers=sizes.layers,
        blocks=sizes.groups,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        vocabulary=sizes.vocabulary,
        positions=longest,
    )
    decoder = engine(
        backend,
        quantise(made, weights),
        batch=1,
        capacity=longest,
        cross_capacity=sizes.encoder_positions,
    )
    del made
    gc.collect()
    decoder.start([torch.randn(sizes.encoder_positions, sizes.width)], [[1]], eos=-1, max_length=longest)
    assert isinstance(decoder, CachedEngine)
    decoder.cache.kv.normal_()  # pages that nobody wrote would all be one page of zeros
    group = sizes.layers // sizes.groups
    keys = Keys.of(decoder.cache.kv[-group:])
    points, bandwidth = [], []
    for length in lengths:
        progress(f"{length:,} positions")
        bandwidth.append(read_gb_per_s())
        points.append(_point(decoder, keys, length, rounds))
    progress("stages of a step")
    stages = _stages(decoder, lengths[0], rounds)
    progress("checking by real steps")
    checks = [_check(decoder, point, k) for point in _some(points) for k in (1, K_INF)]
    return {
        "shape": shape,
        "weights": weights,
        "backend": backend,
        "read_gb_per_s": round(median(bandwidth), 1),
        "warnings": warnings([], {"cores_busy_elsewhere": elsewhere.cores(), "cpu": machine.cpu()}),
        "points": points,
        "stages": stages,
        "checks": checks,
        "acceptance": acceptance(),
    }


def _some(points: Sequence[Point]) -> Sequence[Point]:
    """The first, the middle and the last."""
    return [points[i] for i in sorted({0, len(points) // 2, len(points) - 1})]


def _point(decoder: CachedEngine, keys: Keys, length: int, rounds: int) -> Point:
    heads, width = keys.kv.shape[3], keys.kv.shape[5]
    q = torch.randn(1, heads, 1, width).to(keys.kv.dtype)
    cases: dict[str, Callable[[], object]] = {
        name: lambda variant=variant: variant(q, keys, length)  # type: ignore[misc]
        for name, variant in VARIANTS.items()
    }
    cases |= {"step": lambda: decoder.step(1, False), "kvspn_step": lambda: decoder.step(1, True)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for _ in range(2):  # the first wakes threads
                decoder.lengths.fill_(length)
                decoder.finished.fill_(False)
                start = time.perf_counter()
                case()
                milliseconds = (time.perf_counter() - start) * 1e3
            times[name].append(milliseconds)
    ratios = [ours / plain for plain, ours in zip(times["step"], times["kvspn_step"], strict=True)]
    medians = {name: round(median(each), 4) for name, each in times.items()}
    return Point(
        length,
        medians.pop("step"),
        medians.pop("kvspn_step"),
        round(median(ratios) - 1, 4),
        medians,
        {name: _bytes(name, keys, length) for name in VARIANTS},
        decoder.cache.kv[..., :length, :].numel() * keys.kv.element_size(),
        all(_correct(name, q, keys, length) for name in VARIANTS),
        {name: _interval(each) for name, each in {**times, "overhead": [r - 1 for r in ratios]}.items()},
    )


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    found = of_median(values)
    return found and (round(found[0], 4), round(found[1], 4))


def _stages(decoder: CachedEngine, length: int, rounds: int) -> list[Stage]:
    """Of a plain and of a KVSPN step; none where the engine cannot tell."""
    if not isinstance(decoder, NativeEngine) or decoder.device != "cpu":
        return []
    found = []
    for name, draft in (("plain", False), ("KVSPN", True)):
        decoder.lengths.fill_(length)
        decoder.finished.fill_(False)
        stages = planned(decoder, draft)
        total = sum(stage.bytes for stage in stages.values())
        times: dict[str, list[float]] = {stage: [] for stage in stages}
        reads = []
        for _ in range(rounds):
            for _ in range(2):  # the first wakes threads
                decoder.lengths.fill_(length)
                decoder.finished.fill_(False)
                timed = decoder.profile(1, draft)
            taken: Counter[str] = Counter()
            for stage, nanoseconds, _ in timed:
                taken[stage] += nanoseconds
            for stage, each in times.items():
                each.append(taken[stage] / 1e6)
            reads.append(read_milliseconds(total))
        for stage, (count, size) in stages.items():
            shares = [100 * read * size / total / ms for read, ms in zip(reads, times[stage], strict=True)]
            percent = round(median(shares), 1) if size else None
            ms = round(median(times[stage]), 4)
            found.append(Stage(name, stage, count, ms, _interval(times[stage]), size, percent))
    return found


def _correct(name: str, q: Tensor, keys: Keys, length: int) -> bool:
    """Against the formula in fp32, on the keys that the variant is to see."""
    exact = _attend(q.float(), _one_sequence(_seen(name, keys, length)))
    error = (VARIANTS[name](q, keys, length).float() - exact).abs().max()
    return bool(error <= 4 * torch.finfo(q.dtype).eps * exact.abs().max())


def _seen(name: str, keys: Keys, length: int) -> Tensor:
    """The keys and values of a variant, fp32 [n, 2, 1, H, N, D]."""
    if name == "int8":
        return keys.int8[..., :length, :] * keys.scale[..., :length, None]
    kv = (keys.kv[-1:] if name == "last layer" else keys.kv)[..., :length, :].float()
    if name not in ("strided", "pooled"):
        return kv
    older = _older(length)
    thinned = kv[..., :older:STRIDE, :] if name == "strided" else keys.pooled[..., : older // STRIDE, :]
    return torch.cat([thinned.float(), kv[..., older:, :]], dim=4)


def _bytes(name: str, keys: Keys, length: int) -> int:
    """That a variant reads, not counting copies it makes first."""
    layers, _, _, heads, _, width = keys.kv.shape
    older = _older(length) if name in ("strided", "pooled") else 0
    positions = older // STRIDE + length - older
    each = width + 4 if name == "int8" else width * keys.kv.element_size()
    return (1 if name == "last layer" else layers) * 2 * heads * positions * each


def _check(decoder: CachedEngine, point: Point, k: int) -> Check:
    """Real decoding from a length on: plain and with KVSPN, in turn."""
    ratios = []
    for _ in range(4):
        seconds = []  # a token, plain and drafted
        for draft in (False, True):
            decoder.lengths.fill_(point.length)
            decoder.finished.fill_(False)
            decoder.stats.zero_()
            start = time.perf_counter()
            for _ in range(_CHECK_STEPS):
                decoder.step(k, draft)
            elapsed = time.perf_counter() - start
            seconds.append(elapsed / (int(decoder.lengths) - point.length))
        ratios.append(seconds[0] / seconds[1])
    acceptance = int(decoder.stats[0, 2]) / _CHECK_STEPS
    return Check(
        point.length,
        "inf" if k == K_INF else str(k),
        round(acceptance, 4),
        round(speedup(point.overhead, acceptance), 3),
        round(median(ratios), 3),
    )
