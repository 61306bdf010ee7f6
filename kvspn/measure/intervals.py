"""Confidence intervals of times: by rank alone, so that they ask nothing of how times are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, floor, sqrt
from statistics import NormalDist, median

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Of two samples of times, later over earlier: the estimate, and its confidence interval."""

    estimate: float
    low: float
    high: float


def of_median(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The interval that holds the median of what the values are drawn from, as long as they are independent.

    Its ends are two of the values: as many lie outside as a fair coin makes likely. None where there are too
    few for that confidence: 0.95 needs six.
    """
    n, outside, below = len(values), 0, 0.0
    while (below := below + comb(n, outside) * 0.5**n) <= (1 - confidence) / 2:
        outside += 1
    if not outside:
        return None
    ordered = sorted(values)
    return ordered[outside - 1], ordered[-outside]


def ratio(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """The confidence interval of how many times as long ``after`` takes as ``before``.

    The Mann-Whitney rank test turned into an interval (Hodges and Lehmann: the quantiles of the ratios of all
    pairs).

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


def halves_differ(times: Sequence[float]) -> bool:
    """Whether the later half of some times is another than the earlier, by more than 5% and beyond noise."""
    middle = len(times) // 2
    try:
        found = ratio(times[:middle], times[middle:], confidence=0.99)
    except ValueError:  # too few, or a difference below 0: nothing can be said
        return False
    return not found.low <= 1 <= found.high and abs(found.estimate - 1) > 0.05
