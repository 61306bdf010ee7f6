"""`kvspn bench`: what a decoder step and its ops cost here, and whether that has changed."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvspn.cli.common import (
    FORMATS,
    KV,
    Draft,
    check_backend,
    open_decoder,
    print_table,
    span,
    whole_numbers,
    write_json,
)

if TYPE_CHECKING:
    from kvspn.measure.comparison import Change
    from kvspn.measure.intervals import Ratio
    from kvspn.measure.shapes import Shape
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
            help="whisperM2M (7 GB of memory, 14 with --peers), miniature; or one of your own, as in "
            "d=1280,layers=4,heads=20,vocab=51866, also with ffn, groups, encoder, positions, T.",
            show_default=f"{','.join(_SHAPES)}; with --all miniature",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A model as in kvspn translate: its own shape and weights.",
            show_default=False,
        ),
    ] = None,
    draft: Draft = None,
    tokens_per_step: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-step",
            min=1,
            max=2,
            metavar="X",
            help="What the milliseconds of a token divide by.",
            show_default="what the miniature reaches; the row says so",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FORMAT,...",
            help=f"{FORMATS}; or two as base/draft, as in int8/int4.",
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
            help="Positions in the cache, at most 440 at the named shapes.",
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
        int | None,
        typer.Option(
            "--encoder-stride",
            min=1,
            metavar="N",
            help="The draft network attends to every N-th encoder position.",
            show_default="1",
        ),
    ] = None,
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
    from kvspn.measure.shapes import device_of, find_shapes, shape_of
    from kvspn.weights.formats import base_and_draft

    if backends is not None:
        names = [name.strip() for name in backends.split(",")]
        for name in names:
            check_backend(name)
    elif everything:
        names = _ready()
    else:
        names = [default_backend(torch.device("cpu"))]
    weights = [fmt.strip() for fmt in (formats or _FORMATS).split(",")]
    for fmt in weights:
        base_and_draft(fmt)
    decoder = None
    if model is None:
        if draft is not None:
            raise typer.BadParameter(f"--draft must be given with --model; got {draft}")
        # All of it at the large shape takes hours: who wants that says so.
        chosen = find_shapes(shapes or ("miniature" if everything else ",".join(_SHAPES)))
        chosen = {name: _with_draft(shape, short_list, stride) for name, shape in chosen.items()}
    else:
        own = {"--shape": shapes, "--draft-vocabulary": short_list, "--encoder-stride": stride}
        for option, value in own.items():
            if value is not None:
                raise typer.BadParameter(f"{option} is the model's own beside --model; got {value}")
        decoder, positions = open_decoder(model, draft)
        if not decoder.blocks:
            raise typer.BadParameter(
                f"--model must have a draft network, its own or that of --draft; got {model}"
            )
        chosen = {model.resolve().name: shape_of(decoder, positions)}
    many = whole_numbers("--batch", batches or (_BATCHES if everything else "1"), 256)
    longest = min(shape.max_length for shape in chosen.values())
    lengths = lengths or (_LENGTHS if everything and model is None else None)
    long = whole_numbers("--lengths", lengths, longest) if lengths else []
    others = PEERS if peers or (everything and not cold) else ()
    if cold and peers:
        raise typer.BadParameter("--cold must not be given with --peers, whose steps are timed warm")
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
            weights=decoder,
            tokens_per_step=tokens_per_step,
        )
        rows: list[Row] = found["rows"]
        document: dict[str, Any] = {**found, "rows": [asdict(row) for row in rows]}
        if ops or everything:
            timed: list[Row] = []
            for device in dict.fromkeys(device_of(name) for name in names):
                of_ops = time_ops(
                    shapes=chosen,
                    formats=list(dict.fromkeys(base_and_draft(fmt)[0] for fmt in weights)),
                    batches=many,
                    lengths=long,
                    rounds=rounds,
                    cold=cold,
                    device=device,
                    progress=status.update,
                )
                timed += of_ops["ops"]
                document["warnings"] = document["warnings"] + of_ops["warnings"]
            document["ops"] = [asdict(row) for row in timed]
            rows = rows + timed
    _print_rows(rows)
    console = Console(width=None if sys.stdout.isatty() else 150)
    machine = found["machine"]
    console.print(f"A bare read of memory: {machine['read_gb_per_s']} GB/s", end=" ")
    console.print(span(machine["read_gb_per_s_interval"], 1))
    for key, ratios in found["summary"]["speedup"].items():
        for what, over in ratios.items():
            if "fastest_peer" in over:
                ratio, interval = over["over_fastest_peer"], over["over_fastest_peer_interval"]
                console.print(f"{key} {what}: {ratio:.2f} {span(interval, 2)} × {over['fastest_peer']}")
    for warning in document["warnings"]:
        errors.print(f"kvspn: {warning}", markup=False, highlight=False, soft_wrap=True)
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


def _with_draft(shape: Shape, short_list: int | None, stride: int | None) -> Shape:
    """The shape with another draft network."""
    if short_list is not None and short_list > shape.vocabulary:
        raise typer.BadParameter(f"--draft-vocabulary must be from 1 to {shape.vocabulary}; got {short_list}")
    return replace(shape, short_list=short_list or 0, encoder_stride=stride or 1)


def _ready() -> list[str]:
    """The backends that are kernels here: no specification, emulator or interpreter."""
    import torch

    from kvspn.engines import backends

    kernels = ("native", "cuda", "triton") if torch.cuda.is_available() else ("native",)
    found = backends()
    return [name for name in kernels if found[name] is None] or ["reference"]


_HEADINGS = ("what", "backend", "ms", "95%", "min", "max", "GB/s", "of peak", "95%", "of compute", "ok", "")


def _print_rows(rows: list[Row]) -> None:
    """A table of each shape and batch: the steps at a length, or the ops; then what their notes mean."""
    from kvspn.measure.timing import NOTES

    groups: dict[str, list[Row]] = {}
    for row in rows:
        what = "ops" if "/" in row.what else f"T = {row.kv_length}"
        groups.setdefault(f"{row.shape}, batch {row.batch}, {what}", []).append(row)
    for title, group in groups.items():
        kinds = list(dict.fromkeys(map(_case_name, group)))
        # Like beside like, the fastest first.
        ordered = sorted(group, key=lambda row: (kinds.index(_case_name(row)), row.ms_median))
        print_table(_HEADINGS, [_cells(row) for row in ordered], left=2, title=title)
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        typer.echo(f"{note}: {NOTES[note]}")


def _cells(row: Row) -> list[str]:
    digits = 3 if "/" in row.what else 2
    shown = "no interval" not in row.notes  # a difference that may be nothing is no figure
    return [
        _case_name(row),
        f"{row.backend} {row.weights}{f', {row.kv} KV' if row.kv else ''}",
        _figure(row.ms_median if shown else None, digits),
        span(row.ms_interval if shown else None, digits),
        _figure(row.ms_min if shown else None, digits),
        _figure(row.ms_max if shown else None, digits),
        _figure(row.gb_per_s, 1),
        _figure(row.percent_of_measured_peak, 0, "%"),
        span(row.peak_interval, 0),
        _figure(row.percent_of_measured_compute, 1, "%"),
        "yes" if row.correct else "NO",
        ", ".join(row.notes),
    ]


def _figure(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _case_name(row: Row) -> str:
    if "/" in row.what:
        return f"{row.what}, T = {row.kv_length}"
    if row.what == "token":
        whose = "the miniature's " if row.tokens_per_step_of == "miniature" else ""
        return f"token, {whose}{row.tokens_per_step:.2f} a step"
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
    console = Console(width=None if sys.stdout.isatty() else 150)
    cpus, versions = ([document["machine"][key] for document in documents] for key in ("cpu", "versions"))
    for what, (one, other) in (("processor", cpus), ("versions", versions)):
        if one != other:
            differ = [key for key in one | other if one.get(key) != other.get(key)]
            console.print(f"The records differ in {what}: {', '.join(differ)}")
    _print_changes(changes)
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


_CHANGE = ("what", "backend", "batch", "rows", "T", "before, ms", "after, ms", "after / before")


def _print_changes(changes: list[Change]) -> None:
    def spread(ratio: Ratio) -> str:
        return f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"

    print_table(
        (*_CHANGE, "over a bare read", ""),
        [
            (
                f"{change.case['shape']} {change.case['what']}",
                f"{change.case['backend']} {change.case['weights']}",
                *(str(change.case[name]) for name in ("batch", "rows", "kv_length")),
                f"{change.before:.4g}",
                f"{change.after:.4g}",
                spread(change.time),
                spread(change.over_read),
                change.verdict,
            )
            for change in changes
        ],
        left=2,
    )
