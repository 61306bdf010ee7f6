"""`kvspn bench`: what a decoder step costs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvspn.cli.common import Backend

_SHAPES = ("whisperM2M", "miniature")
_FORMATS = ("fp32", "bf16", "int8")


def _parse(names: tuple[str, ...], text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in names:
            raise typer.BadParameter(f"must be of {', '.join(names)}; got {name!r}")
    return chosen


def bench(
    shapes: Annotated[
        str, typer.Option("--shape", metavar="SHAPE,...", help="whisperM2M (3 GB of memory), miniature.")
    ] = ",".join(_SHAPES),
    formats: Annotated[
        str, typer.Option("--weights", metavar="FORMAT,...", help="fp32, bf16, int8.")
    ] = ",".join(_FORMATS),
    backend: Backend = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Timings of each case.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", show_default=False),
    ] = None,
) -> None:
    """Time the decoder step with random weights: plain, and with KVSPN.

    All cases are timed in turn, with the machine's reading bandwidth among them; every one is checked for
    correctness beside its timing.
    """
    from dataclasses import asdict

    from kvspn import benchmark
    from kvspn.engines import default_backend
    from kvspn.machine import cpu, versions

    chosen = _parse(_SHAPES, shapes), _parse(_FORMATS, formats)
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: no such folder to write to")
    import torch

    name = backend or default_backend(torch.device("cpu"))
    with Console(stderr=True).status("") as status:
        found = benchmark.run(chosen[0], [name], chosen[1], rounds, status.update)
    table = Table("shape", "backend", "weights", "what", box=None, pad_edge=False)
    for heading in ("ms", "min", "max", "GB/s", "of peak", "correct"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["rows"]:
        table.add_row(
            row.shape,
            row.backend,
            row.weights,
            row.what,
            *(f"{value:.2f}" for value in (row.ms_median, row.ms_min, row.ms_max)),
            f"{row.gb_per_s:.1f}",
            f"{row.percent_of_measured_peak:.0f}%",
            "yes" if row.correct else "NO",
        )
    Console().print(table)
    Console().print(f"Reading bandwidth, as torch.sum reaches it: {found['machine']['read_gb_per_s']} GB/s")
    if output is not None:
        document: dict[str, Any] = {
            "machine": {**found["machine"], "cpu": cpu(), "versions": versions(), "date": _now()},
            "rows": [asdict(row) for row in found["rows"]],
            "summary": found["summary"],
        }
        output.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    if not all(row.correct for row in found["rows"]):
        raise typer.Exit(1)


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
