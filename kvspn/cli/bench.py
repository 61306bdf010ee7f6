"""`kvspn bench`: what a decoder step costs here."""

from __future__ import annotations

import json
import logging
import warnings
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvspn.cli.common import KV, Backend

if TYPE_CHECKING:
    from kvspn.benchmark import Row

_SHAPES = ("whisperM2M", "miniature")


def bench(
    shapes: Annotated[
        str,
        typer.Option(
            "--shape", metavar="SHAPE,...", help="whisperM2M (5 GB of memory, 14 with --peers), miniature."
        ),
    ] = ",".join(_SHAPES),
    formats: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="FORMAT,...",
            help="fp32, bf16, fp16, int8, int4; or two as base/draft, as in int8/int4.",
        ),
    ] = "fp32,bf16,int8,int4",
    backend: Backend = None,
    kv: KV = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also transformers, CTranslate2, OpenVINO and ONNX Runtime."),
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Timings of each case.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", show_default=False),
    ] = None,
) -> None:
    """Time the decoder step with random weights: of one row and of two, and with KVSPN.

    All cases are timed in turn, with the machine's reading bandwidth among them; every one is checked for
    correctness beside its timing.
    """
    from dataclasses import asdict

    from kvspn import benchmark
    from kvspn.engines import default_backend
    from kvspn.peers import PEERS

    chosen = [name.strip() for name in shapes.split(",")]
    for name in chosen:
        if name not in _SHAPES:
            raise typer.BadParameter(f"must be of {', '.join(_SHAPES)}; got {name!r}")
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: no such folder to write to")
    import torch

    if peers:  # theirs would break into the table
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    errors = Console(stderr=True)
    with errors.status("") as status:
        found = benchmark.run(
            chosen,
            [backend or default_backend(torch.device("cpu"))],
            [fmt.strip() for fmt in formats.split(",")],
            rounds,
            PEERS if peers else (),
            status.update,
            lambda line: errors.print(line, markup=False, highlight=False),
            kv,
        )
    for _, rows in groupby(found["rows"], key=lambda row: row.shape):
        Console().print(_table(list(rows)))
    Console().print(f"A bare read of memory: {found['machine']['read_gb_per_s']} GB/s")
    for key, compared in found["summary"]["speedup"].items():
        for what, ratios in compared.items():
            if "fastest_peer" in ratios:
                Console().print(f"{key} {what}: {ratios['over_fastest_peer']:.2f} × {ratios['fastest_peer']}")
    if output is not None:
        document: dict[str, Any] = {**found, "rows": [asdict(row) for row in found["rows"]]}
        output.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    if not all(row.correct for row in found["rows"]):
        raise typer.Exit(1)


def _table(rows: list[Row]) -> Table:
    """Of one shape: like beside like, the fastest first."""
    table = Table(title=rows[0].shape, title_justify="left", box=None, pad_edge=False)
    for heading in ("what", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "min", "max", "GB/s", "of peak", "ok"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = list(dict.fromkeys((row.what, row.rows) for row in rows))
    for row in sorted(rows, key=lambda row: (kinds.index((row.what, row.rows)), row.ms_median)):
        table.add_row(
            f"{row.what}, {row.rows} row{'s' * (row.rows > 1)}" if row.what == "step" else row.what,
            f"{row.backend} {row.weights}{f', {row.kv} KV' if row.kv else ''}",
            *(f"{value:.2f}" for value in (row.ms_median, row.ms_min, row.ms_max)),
            f"{row.gb_per_s:.1f}",
            f"{row.percent_of_measured_peak:.0f}%",
            "yes" if row.correct else "NO",
        )
    return table
