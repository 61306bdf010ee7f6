"""What each stage of a step takes on a GPU, by stamps of the kernel itself, beside the model's figure.

    python -m bench.stages [--steps 50] [--json stages.json]

Of the first block: its part of a stage, and what it then waits at the barrier for the others. The model,
bench/cuda_model.py, counts both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench import cuda_model
from bench.performance import table
from kvspn.engines import engine
from kvspn.measure.shapes import SHAPES, Shape, begin, capacities
from kvspn.weights.formats import quantise

Stages = list[tuple[str, int, int]]  # name, nanoseconds, bytes; each is followed by its barrier


def measure(shape: Shape, device: str = "cuda", steps: int = 50, draft: bool = True) -> list[Stages]:
    """The stages of some steps of one row, each at the shape's length."""
    weights = quantise(shape.weights(), "fp16").to(device)
    runner = begin(engine("cuda", weights, batch=1, **capacities(shape)), shape)
    found = []
    for _ in range(steps):
        runner.lengths.fill_(shape.length)
        found.append(runner.profile(1, draft))
    return found


def summarise(steps: Sequence[Stages], predicted: Sequence[float]) -> list[dict[str, Any]]:
    """Medians over the steps, of stages with one name together; in microseconds.

    predicted: of each stage, in the same order.
    """
    rows: dict[str, dict[str, Any]] = {}
    stages, barriers = [step[::2] for step in steps], [step[1::2] for step in steps]
    for i, (name, _, size) in enumerate(stages[0]):
        row = rows.setdefault(name, dict.fromkeys(("times", "bytes", "work", "barrier", "model"), 0))
        row["times"] += 1
        row["bytes"] += size
        row["work"] += median(step[i][1] for step in stages) / 1e3
        row["barrier"] += median(step[i][1] for step in barriers) / 1e3
        row["model"] += predicted[i]
    return [{"stage": name, **row} for name, row in rows.items()]


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a table, with the bandwidth that a stage reaches, barrier included."""
    total = {
        "stage": "all",
        **{name: sum(row[name] for row in rows) for name in ("times", "bytes", "work", "barrier", "model")},
    }
    return table(
        ("stage", "times", "MB", "work, µs", "barrier, µs", "GB/s", "model, µs"),
        (
            (
                *(row["stage"], str(row["times"]), f"{row['bytes'] / 1e6:.2f}"),
                *(f"{row['work']:.2f}", f"{row['barrier']:.2f}"),
                *(
                    f"{row['bytes'] / max(row['work'] + row['barrier'], 1e-9) / 1e3:.0f}",
                    f"{row['model']:.2f}",
                ),
            )
            for row in (*rows, total)
        ),
    )


def main(arguments: argparse.Namespace) -> None:
    shape = replace(SHAPES["whisperM2M"], length=arguments.length)
    stages = [*cuda_model.draft_stages(shape), *cuda_model.base_stages(shape)]
    ends = [0.0, *cuda_model.ends(stages)]
    predicted = [end - before for before, end in pairwise(ends)]
    rows = summarise(measure(shape, steps=arguments.steps), predicted)
    print(page(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=SHAPES["whisperM2M"].length, help="T")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
