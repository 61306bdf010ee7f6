"""`kvspn evaluate`: BLEU and acceptance on the shipped test sets."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kvspn.cli.common import KV, Backend, Model, Weights, open_translator, parse_k, silence_transformers

if TYPE_CHECKING:
    from kvspn.assets import SpokenSentence
    from kvspn.speech.evaluation import ClipDecoder, Output, Row
    from kvspn.speech.translator import Translator

    Outputs = Mapping[int | str, Sequence[Output]]
    # model, backend, weights, kv: what a worker opens again
    Opened = tuple[Path | None, str | None, str | None, str | None]

_worker_decoder: ClipDecoder  # of a worker process


class TestSet(str, Enum):
    """A shipped set of spoken sentences."""

    UNSEEN = "unseen"
    HARD = "hard"


def _parse_ks(text: str) -> list[int | str]:
    return list(dict.fromkeys(parse_k(part.strip()) for part in text.split(",")))


def evaluate(
    ks: Annotated[
        Any,
        typer.Option(
            "--k",
            metavar="K,K,...",
            parser=_parse_ks,
            help="Values of k, with commas: whole numbers from 1, or inf.",
        ),
    ] = "1,2,3,inf",
    sets: Annotated[
        list[TestSet] | None,
        typer.Option(
            "--set",
            help="unseen: new sentences of templates known from training; hard: sentences of new templates.",
            show_default="both",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N clips of each set.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, metavar="N", help="Processes that share the clips.")
    ] = 2,
    model: Model = None,
    backend: Backend = None,
    weights: Weights = None,
    kv: KV = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the figures of every direction here.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure translation quality, acceptance and tokens per step on the shipped test sets.

    Every clip is decoded into all six languages, by plain greedy decoding and with KVSPN at each k; the
    spoken language is given.
    """
    from kvspn.assets import read_manifest
    from kvspn.speech.evaluation import score

    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: no such folder to write to")
    names = [each.value for each in sets or TestSet]
    chosen = {name: read_manifest(name)[:limit] for name in names}
    opened = (model, backend, weights, kv)
    translator = open_translator(*opened)
    rows: list[Row] = []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clips"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with _decoder(translator, opened, ks, workers) as decode, progress:
        for name, clips in chosen.items():
            rows += score(name, progress.track(decode(clips), len(clips), description=name))
    Console().print(_table(rows))
    if output is not None:
        document = {"rows": [asdict(row) for row in rows], "machine": _machine(translator, model)}
        output.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


@contextmanager
def _decoder(
    translator: Translator, opened: Opened, ks: list[int | str], workers: int
) -> Iterator[Callable[[list[SpokenSentence]], Iterable[Outputs]]]:
    """Decodes clips in order: here, or in worker processes that each open the model again."""
    from kvspn.speech.evaluation import ClipDecoder

    decoder = ClipDecoder(translator, ks)
    if workers == 1:
        yield partial(map, decoder)
        return
    # Fresh processes: a fork of a process in which torch has threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (opened, ks)) as pool:
        yield partial(pool.map, _decode_in_worker)


def _start_worker(opened: Opened, ks: list[int | str]) -> None:
    import torch

    from kvspn.speech.evaluation import ClipDecoder
    from kvspn.speech.translator import Translator

    global _worker_decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    torch.set_num_threads(1)
    silence_transformers()
    _worker_decoder = ClipDecoder(Translator.from_folder(*opened), ks)


def _decode_in_worker(clip: SpokenSentence) -> Outputs:
    return _worker_decoder(clip)


def _table(rows: list[Row]) -> Table:
    table = Table("set", box=None, pad_edge=False)
    for heading in ("k", "BLEU", "transcription", "accepted", "tokens/step", "as greedy", "as fp32"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.set,
            str(row.k),
            *("–" if bleu is None else f"{bleu:.1f}" for bleu in (row.bleu, row.bleu_transcription)),
            f"{row.acceptance:.1%}",
            f"{row.tokens_per_step:.2f}",
            f"{row.identical_to_greedy:.1%}",
            "–" if row.identical_to_full is None else f"{row.identical_to_full:.1%}",
        )
    return table


def _machine(translator: Translator, model: Path | None) -> dict[str, Any]:
    from kvspn.measure.machine import cpu, gpu, versions

    return {
        "model": "mini (bundled)" if model is None else model.name,
        "parameters": translator.model.num_parameters(),
        "backend": translator.backend,
        "weights": translator.weights or "fp32",
        "kv": translator.kv,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "cpu": cpu(),
        "gpu": gpu(),
    }
