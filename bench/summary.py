"""One page of the records that bench/gpu.sh wrote: python -m bench.summary OUT adds summary.json and .md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.performance import table
from kvspn.measure.steps import miniature

_PAGE = """\
# {device}

Driver {driver}, CUDA {cuda}, torch {torch}, kvspn {kvspn}, {date}; a copy moves {copy_gb_per_s} GB/s.
"ms" is what a caller waits, "device" the time by CUDA events with a cold L2; "GB/s" and "of copy" are the
device's. Launches are the host's in one call, kernels what then runs on the device.

## Costs of a step

A step of two rows over one; what draft and verification add to a greedy step (c); ms a token, greedy and with
KVSPN at k = 1 and the miniature's {tokens_per_step} tokens a step.

{costs}

{groups}

## Left out

{left_out}
"""


def summary(folder: Path, tokens_per_step: float) -> dict[str, Any]:
    """{"machine", "rows", "costs", "left_out"} of the records bench-*.json in a folder; all times in ms.

    Raises:
        ValueError: there is no record.
    """
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("bench-*.json"))]
    if not records:
        raise ValueError(f"{folder}: no record bench-*.json here")
    machine = records[0]["machine_info"]["kvspn"]
    device = machine.get("cuda") or machine["cpu"]
    rows = [_row(each, device["copy_gb_per_s"]) for record in records for each in record["benchmarks"]]
    return {
        "machine": device,
        "tokens_per_step": tokens_per_step,
        "rows": rows,
        "costs": list(_costs(rows, tokens_per_step)),
        "left_out": [each for record in records for each in record["left_out"]],
    }


def _row(record: dict[str, Any], copy_gb_per_s: float) -> dict[str, Any]:
    params, extra = record["params"] or {}, record["extra_info"]
    who = next((params[name] for name in ("backend", "peer", "way") if name in params), record["name"])
    ms = record["stats"]["median"] * 1e3
    device_ms = extra.get("device_ms")
    gb_per_s = extra["bytes"] / (device_ms or ms) / 1e6
    return {
        "shape": extra["shape"],
        "group": record["group"],
        "name": who,
        "kind": params.get("kind"),
        "batch": params.get("batch"),
        "ms": ms,
        "device_ms": device_ms,
        "gb_per_s": gb_per_s,
        "percent_of_copy": 100 * gb_per_s / copy_gb_per_s,
        "launches": extra.get("launches"),
        "kernels": extra.get("kernels"),
    }


def _costs(rows: list[dict[str, Any]], tokens_per_step: float) -> Iterator[dict[str, Any]]:
    steps: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row["kind"]:
            steps.setdefault((row["shape"], row["name"], row["batch"]), {})[row["kind"]] = row["ms"]
    for (shape, name, batch), ms in steps.items():
        if {"greedy", "two rows", "k=1"} <= set(ms):
            yield {
                "shape": shape,
                "name": name,
                "batch": batch,
                "two_row_cost": ms["two rows"] / ms["greedy"],
                "draft_overhead": ms["k=1"] / ms["greedy"] - 1,
                "ms_per_token_greedy": ms["greedy"],
                "ms_per_token": ms["k=1"] / tokens_per_step,
            }


def page(found: dict[str, Any]) -> str:
    """The same in Markdown."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault(f"{row['shape']}: {row['group']}", []).append(row)
    return _PAGE.format(
        **found["machine"],
        tokens_per_step=found["tokens_per_step"],
        costs=table(
            ("shape", "backend", "batch", "two rows", "c", "ms a token, greedy", "k = 1"),
            (
                (
                    *(each["shape"], each["name"], str(each["batch"])),
                    *(f"{each['two_row_cost']:.2f}", f"{each['draft_overhead']:.0%}"),
                    *(f"{each['ms_per_token_greedy']:.3f}", f"{each['ms_per_token']:.3f}"),
                )
                for each in found["costs"]
            ),
        ),
        groups="\n\n".join(f"## {heading}\n\n{_group(rows)}" for heading, rows in groups.items()),
        left_out="\n".join(f"- {each['name']}: {each['reason']}" for each in found["left_out"]) or "Nothing.",
    )


def _group(rows: list[dict[str, Any]]) -> str:
    return table(
        ("", "ms", "device", "GB/s", "of copy", "launches", "kernels"),
        (
            (
                row["name"],
                f"{row['ms']:.3f}",
                "–" if row["device_ms"] is None else f"{row['device_ms']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_copy']:.0f}%",
                *("–" if row[name] is None else str(row[name]) for name in ("launches", "kernels")),
            )
            for row in sorted(rows, key=lambda row: row["ms"])
        ),
    )


def write_summary(folder: Path) -> None:
    """summary.json and summary.md beside the records, by the shipped miniature's tokens a step."""
    figures = miniature()
    assert figures is not None, "bench/results/miniature.json is missing"
    found = summary(folder, figures["tokens_per_step"])
    (folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (folder / "summary.md").write_text(page(found), "utf-8")


if __name__ == "__main__":
    write_summary(Path(sys.argv[1]))
