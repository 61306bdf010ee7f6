"""`kvspn profile`: what long sequences cost in KV, and where KVSPN stops paying."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvspn.cli.common import whole_numbers, write_json


def profile(
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="T,...", help="Positions in the cache.", show_default="64 to 16384, doubling"
        ),
    ] = None,
    shape: Annotated[
        str, typer.Option("--shape", metavar="SHAPE", help="whisperM2M or miniature.")
    ] = "whisperM2M",
    weights: Annotated[
        str, typer.Option("--weights", metavar="FORMAT", help="As in kvspn translate; the cache follows.")
    ] = "bf16",
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Timings of each case.")] = 7,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", show_default=False),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with plots here.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write a trace of single steps here, for Perfetto or chrome://tracing.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the decoder step and the draft's attention at growing lengths, on the native backend.

    The draft's attention to a group of layers is compared with other ways to read or thin the same cache;
    each is checked for correctness beside its timing.
    """
    from dataclasses import asdict

    from kvspn.measure.machine import cpu, versions
    from kvspn.measure.profile import LENGTHS, measure
    from kvspn.measure.shapes import SHAPES

    chosen = LENGTHS if lengths is None else whole_numbers("--lengths", lengths, 1 << 20)
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape must be of {', '.join(SHAPES)}; got {shape!r}")
    for file in (output, page, trace):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: no such folder to write to")
    if page is not None:
        from kvspn.measure import report  # before the work: it may miss matplotlib
    with Console(stderr=True).status("") as status:
        found = measure(chosen, shape=shape, weights=weights, rounds=rounds, progress=status.update)
        if trace is not None:
            from kvspn.measure.trace import write_trace

            status.update("tracing single steps")
            write_trace(trace, shape=shape, weights=weights)
    Console().print(_steps(found["points"]))
    Console().print("\nOne group's attention, one query, ms:")
    Console().print(_attention(found["points"]))
    known = (f"{name} {_share(value)}" for name, value in found["acceptance"].items())
    Console().print(f"Drafts accepted on the miniature: {', '.join(known)}", highlight=False)
    Console().print("\nReal steps, speed-up over plain ones:")
    Console().print(_checks(found["checks"]))
    document: dict[str, Any] = found | {
        "machine": {"cpu": cpu(), "versions": versions(), "date": _now()},
        "points": [asdict(point) for point in found["points"]],
        "checks": [asdict(check) for check in found["checks"]],
    }
    if output is not None:
        write_json(output, document)
    if page is not None:
        page.write_text(report.profile_page(document), "utf-8")
    if not all(point.correct for point in found["points"]):
        raise typer.Exit(1)


def _steps(points: list[Any]) -> Table:
    return _table(
        ("step, ms", "KVSPN step, ms", "breaks even at", "KV, MB"),
        (
            (
                point.length,
                f"{point.step:.2f}",
                f"{point.kvspn_step:.2f}",
                f"{point.overhead:.0%}",
                f"{point.kv_bytes / 1e6:.1f}",
            )
            for point in points
        ),
    )


def _attention(points: list[Any]) -> Table:
    return _table(
        (*points[0].attention, "correct"),
        (
            (
                point.length,
                *(f"{value:.3f}" for value in point.attention.values()),
                "yes" if point.correct else "NO",
            )
            for point in points
        ),
    )


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0%}"


def _checks(checks: list[Any]) -> Table:
    return _table(
        ("k", "accepted", "predicted", "measured"),
        (
            (
                check.length,
                check.k,
                f"{check.acceptance:.0%}",
                f"{check.predicted:.2f} x",
                f"{check.measured:.2f} x",
            )
            for check in checks
        ),
    )


def _table(headings: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> Table:
    table = Table("T", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for length, *cells in rows:
        table.add_row(f"{length:,}", *cells)
    return table


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
