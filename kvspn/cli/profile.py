"""`kvspn profile`: what long sequences cost in KV, and where KVSPN stops paying."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvspn.cli.common import print_table, span, whole_numbers, write_json


def profile(
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="T,...", help="Positions in the cache.", show_default="64 to 16384, doubling"
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            "--shape", metavar="SHAPE", help="whisperM2M, miniature, or your own as in kvspn bench."
        ),
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
    from kvspn.measure.shapes import find_shapes

    chosen = LENGTHS if lengths is None else whole_numbers("--lengths", lengths, 1 << 20)
    if len(find_shapes(shape)) > 1:
        raise typer.BadParameter(f"--shape must be one shape; got {shape!r}")
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
    points = found["points"]
    variants = list(points[0].attention)
    print_table(
        ("T", "step, ms", "95%", "KVSPN step, ms", "95%", "breaks even at", "95%", "KV, MB"),
        [
            (
                f"{point.length:,}",
                f"{point.step:.2f}",
                span(point.intervals["step"]),
                f"{point.kvspn_step:.2f}",
                span(point.intervals["kvspn_step"]),
                f"{point.overhead:.0%}",
                span(point.intervals["overhead"]),
                f"{point.kv_bytes / 1e6:.1f}",
            )
            for point in points
        ],
    )
    if found["stages"]:
        typer.echo(f"\nStages of a step at T = {points[0].length}, all layers together:")
        print_table(
            ("step", "stage", "times", "ms", "95%", "MB", "of a bare read"),
            [
                (
                    stage.step,
                    stage.name,
                    str(stage.count),
                    f"{stage.ms:.3f}",
                    span(stage.interval, 3),
                    f"{stage.bytes / 1e6:.2f}",
                    "–" if stage.percent_of_read is None else f"{stage.percent_of_read:.0f}%",
                )
                for stage in found["stages"]
            ],
            left=2,
        )
    typer.echo("\nOne group's attention, one query, ms and 95%:")
    print_table(
        ("T", *variants, "correct"),
        [
            (
                f"{point.length:,}",
                *(
                    f"{point.attention[name]:.3f} {span(point.intervals[name], 3)}".strip()
                    for name in variants
                ),
                "yes" if point.correct else "NO",
            )
            for point in points
        ],
    )
    known = (f"{name} {_share(value)}" for name, value in found["acceptance"].items())
    typer.echo(f"Drafts accepted on the miniature: {', '.join(known)}")
    typer.echo("\nReal steps, speed-up over plain ones:")
    print_table(
        ("T", "k", "accepted", "predicted", "measured"),
        [
            (
                f"{check.length:,}",
                check.k,
                f"{check.acceptance:.0%}",
                f"{check.predicted:.2f} x",
                f"{check.measured:.2f} x",
            )
            for check in found["checks"]
        ],
    )
    for warning in found["warnings"]:
        typer.echo(f"kvspn: {warning}", err=True)
    document: dict[str, Any] = found | {
        "machine": {"cpu": cpu(), "versions": versions(), "date": _now()},
        "points": [asdict(point) for point in found["points"]],
        "stages": [asdict(stage) for stage in found["stages"]],
        "checks": [asdict(check) for check in found["checks"]],
    }
    if output is not None:
        write_json(output, document)
    if page is not None:
        page.write_text(report.profile_page(document), "utf-8")
    if not all(point.correct for point in found["points"]):
        raise typer.Exit(1)


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0%}"


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
