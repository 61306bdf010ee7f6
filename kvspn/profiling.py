"""What long sequences cost in KV: the decoder step and the draft's attention at growing lengths.

The paper leaves open what its flattened sequence of layers x T keys costs past some 500 tokens
(arXiv 2508.11189). Here is the measurement, and the arithmetic of where the draft stops paying.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.benchmark import SHAPES, miniature
from kvspn.engines import CachedEngine, engine
from kvspn.ops import K_INF, flat_kv_attention
from kvspn.quantisation import quantise
from kvspn.random_decoder import random_decoder
from kvspn.timing import read_gb_per_s

LENGTHS = tuple(64 << i for i in range(9))  # 64 .. 16,384
STRIDE = 4  # of the sparse variant
_CHECK_STEPS = 12


@dataclass(frozen=True)
class Point:
    """One length T, batch 1; times are medians in milliseconds.

    step, kvspn_step: a plain greedy step; draft, verification of two rows and all.
    attention: by variant, one query over the cache of one group of layers (see VARIANTS).
    attention_bytes: keys and values that each variant reads, not counting copies it makes first.
    correct: every variant within bf16's rounding of the same keys' formula in fp32.
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


@dataclass(frozen=True)
class Check:
    """A run of real steps at a length: its speedup over plain steps, and what the arithmetic says."""

    length: int
    k: str
    acceptance: float
    predicted: float
    measured: float


def acceptance() -> dict[str, float | None]:
    """Of drafts at k = 1 on the miniature, by variant; None where that variant's is not measured."""
    figures = miniature()
    measured = figures["acceptance"] if figures else None
    return {name: measured if name in _SAME_KEYS else None for name in VARIANTS}


def speedup(overhead: float, acceptance: float) -> float:
    """Of one-token drafting over plain decoding: 1 + acceptance tokens for 1 + overhead of the time."""
    return (1 + acceptance) / (1 + overhead)


def flattened(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    """All layers' keys as one sequence, read where they lie."""
    return flat_kv_attention(q, kv, length, False)


def concatenated(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    """The same keys copied into one tensor first, then torch's scaled_dot_product_attention."""
    keys, values = kv[..., : int(length), :].permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


def merged(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    """Layer by layer, the results weighed by their softmax denominators."""
    outs, denominators = [], []
    for keys, values in kv[..., : int(length), :]:
        scores = (q @ keys.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        denominators.append(scores.logsumexp(-1, keepdim=True))
        outs.append(scores.softmax(-1).to(q.dtype) @ values)
    weights = torch.stack(denominators).softmax(0).to(q.dtype)
    return (torch.stack(outs) * weights).sum(0).transpose(1, 2).flatten(2)


def last_layer(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    """The group's last layer alone: an ablation of the paper's idea."""
    return flat_kv_attention(q, kv[-1:], length, False)


def strided(q: Tensor, kv: Tensor, length: Tensor) -> Tensor:
    """Every fourth position of every layer, read where it lies."""
    return flat_kv_attention(q, kv[..., ::STRIDE, :], (length + STRIDE - 1) // STRIDE, False)


_SAME_KEYS = ("flattened", "concatenated", "merged")  # three ways to one result

VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flattened": flattened,
    "concatenated": concatenated,
    "merged": merged,
    "last layer": last_layer,
    "strided": strided,
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
    """Returns {"shape", "weights", "backend", "read_gb_per_s", "points", "checks", "acceptance"}.

    That is lists of Point and Check, and :func:`acceptance`.

    Args:
        lengths: T, positions in the self-attention cache, each at least 1.
        shape: of kvspn.benchmark.SHAPES. weights: a format (kvspn.quantisation). backend: of the steps.
        rounds: timings of each case, in turn.
    """
    progress("making random weights")
    sizes = SHAPES[shape]
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
    kv = decoder.cache.kv[-group:]
    points, bandwidth = [], []
    for length in lengths:
        progress(f"{length:,} positions")
        bandwidth.append(read_gb_per_s())
        points.append(_point(decoder, kv, length, rounds))
    progress("checking by real steps")
    checks = [_check(decoder, point, k) for point in _some(points) for k in (1, K_INF)]
    return {
        "shape": shape,
        "weights": weights,
        "backend": backend,
        "read_gb_per_s": round(median(bandwidth), 1),
        "points": points,
        "checks": checks,
        "acceptance": acceptance(),
    }


def _some(points: Sequence[Point]) -> Sequence[Point]:
    """The first, the middle and the last."""
    return [points[i] for i in sorted({0, len(points) // 2, len(points) - 1})]


def _point(decoder: CachedEngine, kv: Tensor, length: int, rounds: int) -> Point:
    heads, width = kv.shape[3], kv.shape[5]
    q = torch.randn(1, heads, 1, width).to(kv.dtype)
    position = torch.tensor([length], dtype=torch.int32)
    cases: dict[str, Callable[[], object]] = {
        name: lambda variant=variant: variant(q, kv, position)  # type: ignore[misc]
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
    layer = 2 * heads * length * width * kv.element_size()
    read = dict.fromkeys(VARIANTS, len(kv) * layer) | {"last layer": layer}
    read["strided"] = len(kv) * layer // length * -(-length // STRIDE)
    return Point(
        length,
        medians.pop("step"),
        medians.pop("kvspn_step"),
        round(median(ratios) - 1, 4),
        medians,
        read,
        decoder.cache.kv.shape[0] * layer,
        all(_correct(name, q, kv, position) for name in VARIANTS),
    )


def _correct(name: str, q: Tensor, kv: Tensor, length: Tensor) -> bool:
    """Against the formula in fp32, on the keys that the variant is to see."""
    seen = kv[-1:] if name == "last layer" else kv
    seen = seen[..., : int(length), :]
    seen = (seen[..., ::STRIDE, :] if name == "strided" else seen).float()
    exact = concatenated(q.float(), seen, torch.tensor([seen.shape[4]]))
    error = (VARIANTS[name](q, kv, length).float() - exact).abs().max()
    return bool(error <= 4 * torch.finfo(q.dtype).eps * exact.abs().max())


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
