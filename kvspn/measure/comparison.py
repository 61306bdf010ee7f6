"""Two records of `kvspn bench`, row by row: what is faster, what is slower, and what is noise.

By confidence intervals of the ratios of their rounds' times (kvspn.measure.intervals).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvspn.measure.intervals import CONFIDENCE, Ratio, ratio

DERIVED = ("draft", "token")  # rows whose times follow from others'
_SAME_CASE = ("what", "shape", "backend", "weights", "batch", "rows", "kv_length", "device", "cache", "kv")


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


def compare(before: dict[str, Any], after: dict[str, Any], confidence: float = CONFIDENCE) -> list[Change]:
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
