"""Two records of the benchmark: a change is told, and noise is not."""

from __future__ import annotations

import copy
from itertools import combinations
from math import comb

import numpy as np
import pytest

from kvspn.measure.comparison import compare
from kvspn.measure.intervals import ratio

CASE = {
    "what": "step",
    "shape": "tiny",
    "backend": "native",
    "weights": "fp32",
    "batch": 1,
    "rows": 1,
    "kv_length": 64,
    "device": "cpu",
    "cache": "warm",
    "kv": None,
}


def record(times, reads=None, **fields) -> dict:
    times = list(map(float, times))
    reads = [1.0] * len(times) if reads is None else list(map(float, reads))
    row = {**CASE, "ms": times, "read_ms": reads, "ms_median": float(np.median(times)), "correct": True}
    return {"rows": [{**row, **fields}]}


def noisy(generator, count=20):
    """Times of a shared machine: skewed, now and then far off."""
    return 10 * np.exp(0.05 * generator.standard_normal(count)) + 8 * (generator.random(count) < 0.1)


def test_estimate_and_interval() -> None:
    found = ratio([10, 11, 12, 13, 14], [20, 22, 24, 26, 28])
    assert found.estimate == 2
    assert 20 / 14 < found.low < 2 < found.high < 28 / 10
    swapped = ratio([20, 22, 24, 26, 28], [10, 11, 12, 13, 14])
    assert (swapped.low, swapped.high) == pytest.approx((1 / found.high, 1 / found.low))


@pytest.mark.parametrize(("n", "m", "confidence"), [(4, 4, 0.95), (5, 6, 0.9), (6, 6, 0.99)])
def test_interval_is_that_of_the_exact_test(n: int, m: int, confidence: float) -> None:
    """Over all orders of n + m times of one distribution, 1 is outside as seldom as is asked for."""
    wrong = 0
    for places in combinations(range(n + m), n):
        times = [1.5**rank for rank in range(n + m)]
        before = [times[i] for i in places]
        after = [times[i] for i in range(n + m) if i not in places]
        found = ratio(before, after, confidence)
        wrong += not found.low <= 1 <= found.high
    assert 0 < wrong / comb(n + m, n) <= 1 - confidence


def test_noise_is_not_a_change() -> None:
    generator = np.random.default_rng(0)
    verdicts = [compare(record(noisy(generator)), record(noisy(generator)))[0].verdict for _ in range(100)]
    assert verdicts.count("same") >= 90


@pytest.mark.parametrize(("factor", "verdict"), [(0.85, "faster"), (1.15, "slower")])
def test_a_change_is_told_from_noise(factor: float, verdict: str) -> None:
    generator = np.random.default_rng(0)
    (change,) = compare(record(noisy(generator)), record(factor * noisy(generator)))
    assert change.verdict == verdict
    assert change.time.low < factor < change.time.high
    assert change.case == CASE


def test_a_faster_machine_is_not_a_faster_kernel() -> None:
    generator = np.random.default_rng(0)
    reads = 1 + 0.05 * generator.random(20)
    (change,) = compare(record(noisy(generator), reads), record(0.7 * noisy(generator), 0.7 * reads))
    assert change.verdict == "same"
    assert change.time.high < 1 and change.over_read.low < 1 < change.over_read.high


def test_wrong_output_is_never_faster() -> None:
    generator = np.random.default_rng(0)
    (change,) = compare(record(noisy(generator)), record(0.5 * noisy(generator), correct=False))
    assert change.verdict == "wrong"


def test_many_rows_ask_for_more() -> None:
    """One row in twenty would else be a gain by chance alone."""
    generator = np.random.default_rng(0)
    before, after = ({"rows": [], "ops": []} for _ in range(2))
    for i in range(200):
        for document in (before, after):
            document["ops" if i % 2 else "rows"] += record(noisy(generator), kv_length=i)["rows"]
    assert {change.verdict for change in compare(before, after)} == {"same"}
    assert len(compare(before, after)) == 200


def test_only_timed_rows_of_both_are_compared() -> None:
    before, after = record(range(1, 9)), record(range(1, 9))
    after["rows"] += record(range(-4, 4), what="draft")["rows"] + record(range(1, 9), batch=4)["rows"]
    assert [change.case["batch"] for change in compare(before, after)] == [1]
    assert compare(record(range(1, 9), batch=2), after) == []


def test_bad_input() -> None:
    old = copy.deepcopy(record([1, 2, 3, 4]))
    del old["rows"][0]["ms"]
    with pytest.raises(ValueError, match="older kvspn bench"):
        compare(old, record([1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"more rounds for 95\.00%, got 3 and 4"):
        ratio([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="after must hold times above 0"):
        ratio([1, 2, 3, 4], [1, 2, 0, 4])
