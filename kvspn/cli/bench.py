"""`kvspn bench`: what a decoder step and its ops cost here, and whether that has changed."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvspn.cli.common import KV, whole_numbers, write_json

if TYPE_CHECKING:
    from kvspn.measure.comparison import Change
    from kvspn.measure.timing import Row

_SHAPES = ("whisperM2M", "miniature")
_FORMATS = "fp32,bf16,int8,int4"
_BATCHES = "1,8,32"
_LENGTHS = "64,440"
SAVED = Path(".kvspn-bench")  # in the working folder, as .git and .pytest_cache are


def bench(
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="SHAPE,...",
            help="whisperM2M (5 GB of memory, 14 with --peers), miniature.",
            show_default=f"{','.join(_SHAPES)}; with --all miniature",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FORMAT,...",
            help="fp32, bf16, fp16, int8, int4; or two as base/draft, as in int8/int4.",
            show_default=_FORMATS,
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME,...",
            help="Of kvspn doctor's list: native, cuda, triton, reference.",
            show_default="the fastest that is here",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option("--batch", metavar="B,...", help="Rows decoded together.", show_default="1"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="T,...",
            help="Positions in the cache, at most 440.",
            show_default="the shape's own",
        ),
    ] = None,
    kv: KV = None,
    short_list: Annotated[
        int | None,
        typer.Option(
            "--draft-vocabulary",
            min=1,
            metavar="N",
            help="Tokens that the draft network chooses from.",
            show_default="all",
        ),
    ] = None,
    stride: Annotated[
        int,
        typer.Option(
            "--encoder-stride",
            min=1,
            metavar="N",
            help="The draft network attends to every N-th encoder position.",
        ),
    ] = 1,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also transformers, CTranslate2, OpenVINO and ONNX Runtime."),
    ] = False,
    ops: Annotated[bool, typer.Option("--ops", help="Also every op by itself.")] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every backend but the reference, format, op and peer; batches to 32, T to 440.",
        ),
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Empty the processor's caches before each timing; no peers then.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Timings of each case.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the record here.", show_default=False),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write the rows here.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Write the roofline plots here.", show_default=False),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with plots here.", show_default=False),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="NAME", help=f"Keep the record in {SAVED}.", show_default=False),
    ] = None,
    compared: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Time nothing: compare two records, each the name of a saved one or a file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time the decoder step with random weights: of one row and of two, and with KVSPN.

    All cases are timed in turn, with the machine's reading bandwidth among them; every one is checked for
    correctness beside its timing.
    """
    for file in (output, sheet, picture, page):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: no such folder to write to")
    if compared is not None:
        _compare(*compared, output)
        return
    # All of it at the large shape takes hours: who wants that says so.
    shapes = shapes or ("miniature" if everything else ",".join(_SHAPES))
    chosen = [name.strip() for name in shapes.split(",")]
    for name in chosen:
        if name not in _SHAPES:
            raise typer.BadParameter(f"must be of {', '.join(_SHAPES)}; got {name!r}")
    if save is not None and not re.fullmatch(r"[\w.+-]*\w", save):
        raise typer.BadParameter(
            f"--save must be a name of letters, digits, '.', '_', '+', '-'; got {save!r}"
        )
    if picture is not None or page is not None:
        from kvspn.measure import report  # before the work: it may miss matplotlib
    import torch

    from kvspn.engines import default_backend
    from kvspn.measure import steps
    from kvspn.measure.ops import run as time_ops
    from kvspn.measure.peers import PEERS
    from kvspn.measure.shapes import MAX_LENGTH, device_of
    from kvspn.weights.formats import base_and_draft

    if backends is not None:
        names = [name.strip() for name in backends.split(",")]
    elif everything:
        names = _ready()
    else:
        names = [default_backend(torch.device("cpu"))]
    weights = [fmt.strip() for fmt in (formats or _FORMATS).split(",")]
    many = whole_numbers("--batch", batches or (_BATCHES if everything else "1"), 256)
    long = whole_numbers("--lengths", lengths, MAX_LENGTH) if lengths else []
    if everything and not lengths:
        long = whole_numbers("--lengths", _LENGTHS, MAX_LENGTH)
    others = PEERS if peers or (everything and not cold) else ()
    if others:  # theirs would break into the table
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    errors = Console(stderr=True)
    with errors.status("") as status:
        found = steps.run(
            chosen,
            names,
            weights,
            rounds,
            others,
            status.update,
            lambda line: errors.print(line, markup=False, highlight=False),
            batches=many,
            lengths=long,
            cold=cold,
            kv=[kv] if kv else (),
            short_list=short_list or 0,
            encoder_stride=stride,
        )
        rows: list[Row] = found["rows"]
        document: dict[str, Any] = {**found, "rows": [asdict(row) for row in rows]}
        if ops or everything:
            timed: list[Row] = []
            for device in dict.fromkeys(device_of(name) for name in names):
                timed += time_ops(
                    shapes=chosen,
                    formats=list(dict.fromkeys(base_and_draft(fmt)[0] for fmt in weights)),
                    batches=many,
                    lengths=long,
                    rounds=rounds,
                    cold=cold,
                    device=device,
                    progress=status.update,
                )["ops"]
            document["ops"] = [asdict(row) for row in timed]
            rows = rows + timed
    console = _console()
    for table in _tables(rows):
        console.print(table)
    console.print(f"A bare read of memory: {found['machine']['read_gb_per_s']} GB/s")
    for key, ratios in found["summary"]["speedup"].items():
        for what, over in ratios.items():
            if "fastest_peer" in over:
                console.print(f"{key} {what}: {over['over_fastest_peer']:.2f} × {over['fastest_peer']}")
    if save is not None:
        SAVED.mkdir(exist_ok=True)
        write_json(SAVED / f"{save}.json", document)
    if output is not None:
        write_json(output, document)
    if sheet is not None:
        _write_csv(sheet, rows)
    if picture is not None:
        picture.write_bytes(report.bench_png(document))
    if page is not None:
        page.write_text(report.bench_page(document), "utf-8")
    if not all(row.correct for row in rows):
        raise typer.Exit(1)


def _console() -> Console:
    """As wide as its tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 150)


def _ready() -> list[str]:
    """The backends that are kernels here: no specification, emulator or interpreter."""
    import torch

    from kvspn.engines import backends

    kernels = ("native", "cuda", "triton") if torch.cuda.is_available() else ("native",)
    found = backends()
    return [name for name in kernels if found[name] is None] or ["reference"]


def _tables(rows: list[Row]) -> Iterator[Table]:
    """Of one shape and batch each: the steps at a length, or the ops."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        what = "ops" if "/" in row.what else f"T = {row.kv_length}"
        groups.setdefault(f"{row.shape}, batch {row.batch}, {what}", []).append(row)
    for title, group in groups.items():
        yield _table(title, group)


def _table(title: str, rows: list[Row]) -> Table:
    """Like beside like, the fastest first."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("what", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "min", "max", "GB/s", "of peak", "of compute", "ok"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(map(_case_name, rows)))
    for row in sorted(rows, key=lambda row: (kinds.index(_case_name(row)), row.ms_median)):
        digits = 3 if "/" in row.what else 2
        table.add_row(
            _case_name(row),
            f"{row.backend} {row.weights}{f', {row.kv} KV' if row.kv else ''}",
            *(f"{value:.{digits}f}" for value in (row.ms_median, row.ms_min, row.ms_max)),
            f"{row.gb_per_s:.1f}",
            f"{row.percent_of_measured_peak:.0f}%",
            f"{row.percent_of_measured_compute:.1f}%",
            "yes" if row.correct else "NO",
        )
    return table


def _case_name(row: Row) -> str:
    if "/" in row.what:
        return f"{row.what}, T = {row.kv_length}"
    return f"{row.what}, {row.rows} row{'s' * (row.rows > 1)}" if row.what == "step" else row.what


def _write_csv(file: Path, rows: list[Row]) -> None:
    """One line each, without the times of single rounds."""
    names = [name for name in asdict(rows[0]) if name not in ("ms", "read_ms")]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def _compare(before: str, after: str, output: Path | None) -> None:
    from kvspn.measure.comparison import compare

    documents = [_open(name) for name in (before, after)]
    changes = compare(documents[0], documents[1])
    console = _console()
    cpus, versions = ([document["machine"][key] for document in documents] for key in ("cpu", "versions"))
    for what, (one, other) in (("processor", cpus), ("versions", versions)):
        if one != other:
            differ = [key for key in one | other if one.get(key) != other.get(key)]
            console.print(f"The records differ in {what}: {', '.join(differ)}")
    console.print(_changes(changes))
    counts = Counter(change.verdict for change in changes)
    console.print(
        ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "Nothing shared"
    )
    if output is not None:
        write_json(output, [asdict(change) for change in changes])


def _open(name: str) -> dict[str, Any]:
    """The record that is saved under a name, or else in a file."""
    saved = SAVED / f"{name}.json"
    file = saved if saved.is_file() else Path(name)
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in SAVED.glob("*.json"))) or "nothing"
        raise ValueError(f"--compare: {name} is neither a file nor saved in {SAVED}, which holds {there}")
    try:
        document = json.loads(file.read_text("utf-8"))
        document["machine"], document["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of kvspn bench") from error
    return document


def _changes(changes: list[Change]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("backend")
    for heading in (
        "batch",
        "rows",
        "T",
        "before, ms",
        "after, ms",
        "after / before",
        "over a bare read",
        "",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        case = change.case
        table.add_row(
            f"{case['shape']} {case['what']}",
            f"{case['backend']} {case['weights']}",
            *(str(case[name]) for name in ("batch", "rows", "kv_length")),
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            *(
                f"{each.estimate:.3f} [{each.low:.3f}, {each.high:.3f}]"
                for each in (change.time, change.over_read)
            ),
            change.verdict,
        )
    return table
