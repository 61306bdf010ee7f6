"""Two records of `kvspn bench`, row by row: what is faster, what is slower, and what is noise.

The Mann-Whitney rank test on the rounds' times, turned into a confidence interval of their ratio (Hodges and
Lehmann: the quantiles of the ratios of all pairs). It asks nothing of how times are distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, sqrt
from statistics import NormalDist, median
from typing import Any

from kvspn.measure.steps import DERIVED

_SAME_CASE = ("what", "shape", "backend", "weights", "batch", "rows", "kv_length", "device", "cache", "kv")


@dataclass(frozen=True)
class Ratio:
    """Of two samples of times, later over earlier: the estimate, and its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One case in both records.

    case: the fields of its row that say what it is.
    before, after: medians in milliseconds.
    time: the ratio of the times. over_read: of the times over the bare reads of their rounds, which
        takes out what the machine did between the records.
    verdict: "faster" or "slower" where both intervals say so, else "same"; "wrong" where the later output is.
    """

    case: dict[str, Any]
    before: float
    after: float
    time: Ratio
    over_read: Ratio
    verdict: str


def ratio(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Ratio:
    """The confidence interval of how many times as long ``after`` takes as ``before``.

    Args:
        before, after: times of rounds, each above 0. The fewer, the wider the interval.
        confidence: that the interval holds the true ratio, as long as rounds are independent.

    Raises:
        ValueError: times that are not above 0, or too few for that confidence (four of each are enough
            for 0.95).
    """
    for name, times in (("before", before), ("after", after)):
        if not times or min(times) <= 0:
            raise ValueError(f"{name} must hold times above 0, got {list(times)}")
    pairs = sorted(b / a for a in before for b in after)
    n, m = len(before), len(after)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) * sqrt(n * m * (n + m + 1) / 12)
    outside = floor(n * m / 2 - spread)  # pairs on either side
    if outside < 1:
        raise ValueError(f"before and after must hold more rounds for {confidence:.2%}, got {n} and {m}")
    return Ratio(median(pairs), pairs[outside - 1], pairs[-outside])


def compare(before: dict[str, Any], after: dict[str, Any], confidence: float = 0.95) -> list[Change]:
    """The cases that two records share.

    Args:
        before, after: documents of `kvspn bench --json`.
        confidence: that every verdict that is not "same" is right (Bonferroni: each interval is the wider,
            the more rows there are).

    Raises:
        ValueError: a record without the rounds' times, or with too few for so many rows.
    """
    earlier, later = (_timed(document) for document in (before, after))
    shared = [case for case in later if case in earlier]
    each = 1 - (1 - confidence) / max(len(shared), 1)
    return [_change(case, earlier[case], later[case], each) for case in shared]


def _timed(document: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows that were timed themselves, by what they are."""
    rows = [row for row in document.get("rows", []) + document.get("ops", []) if row["what"] not in DERIVED]
    if not all("ms" in row for row in rows):
        raise ValueError("a record must hold the times of its rounds; this one is of an older kvspn bench")
    return {tuple(row.get(name) for name in _SAME_CASE): row for row in rows}


def _change(
    case: tuple[Any, ...], before: dict[str, Any], after: dict[str, Any], confidence: float
) -> Change:
    time = ratio(before["ms"], after["ms"], confidence)
    over_read = ratio(_over_read(before), _over_read(after), confidence)
    if not after["correct"]:
        verdict = "wrong"
    elif max(time.high, over_read.high) < 1:
        verdict = "faster"
    elif min(time.low, over_read.low) > 1:
        verdict = "slower"
    else:
        verdict = "same"
    named = dict(zip(_SAME_CASE, case, strict=True))
    return Change(named, before["ms_median"], after["ms_median"], time, over_read, verdict)


def _over_read(row: dict[str, Any]) -> list[float]:
    return [ms / read for ms, read in zip(row["ms"], row["read_ms"], strict=True)]
