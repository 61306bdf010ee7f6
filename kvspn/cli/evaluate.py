"""`kvspn evaluate`: BLEU and acceptance on the shipped test sets; error rates on recordings of your own."""

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

from kvspn.cli.common import (
    KV,
    Backend,
    Draft,
    Model,
    Task,
    Weights,
    open_translator,
    parse_k,
    print_table,
    print_warning,
    silence_transformers,
    write_json,
)

if TYPE_CHECKING:
    from kvspn.assets import SpokenSentence
    from kvspn.decoding import DecodeStats
    from kvspn.speech.evaluation import ClipDecoder, Output, Row
    from kvspn.speech.peers import Recogniser
    from kvspn.speech.recognition import System
    from kvspn.speech.translator import Translator

    Outputs = Mapping[int | str, Sequence[Output]]
    # model, backend, weights, kv, draft: what a worker opens again
    Opened = tuple[Path | None, str | None, str | None, str | None, Path | None]

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
            show_default="1,2,3,inf",
        ),
    ] = None,
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
        int | None,
        typer.Option(
            "--workers", min=1, metavar="N", help="Processes that share the clips.", show_default="2"
        ),
    ] = None,
    speech: Annotated[
        Path | None,
        typer.Option(
            "--speech",
            metavar="MANIFEST",
            help="Instead of the shipped sets: JSON lines with path, language and text of each clip. "
            "--weights may then be several, with commas.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Of --speech: only clips of this split, or folder."),
    ] = None,
    languages: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE", help="Of --speech: only clips in these languages."),
    ] = None,
    task: Annotated[
        Task | None, typer.Option("--task", help="With --speech.", show_default="transcribe")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="With --speech: also transformers, faster-whisper and whisper.cpp."),
    ] = False,
    model: Model = None,
    draft: Draft = None,
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

    With --speech: word or character error rates on recordings, each weight format on the same encoder
    states, greedy and without timestamps; with --task translate BLEU against their translations.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: no such folder to write to")
    opened = (model, backend, weights, kv, draft)
    if speech is not None:
        _refuse("must be left out with --speech", {"--k": ks, "--set": sets, "--workers": workers})
        said = Task.TRANSCRIBE if task is None else task
        _evaluate_speech(speech, split, languages or [], limit, said.value, peers, opened, output)
    else:
        alone = {"--split": split, "--language": languages, "--task": task, "--peers": peers}
        _refuse("needs --speech", alone)
        _evaluate_sets(
            sets or list(TestSet), ks or _parse_ks("1,2,3,inf"), limit, workers or 2, opened, output
        )


def _refuse(why: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def _evaluate_sets(
    sets: list[TestSet],
    ks: list[int | str],
    limit: int | None,
    workers: int,
    opened: Opened,
    output: Path | None,
) -> None:
    from kvspn.assets import read_manifest
    from kvspn.speech.evaluation import score

    chosen = {each.value: read_manifest(each.value)[:limit] for each in sets}
    translator = open_translator(*opened)
    if translator.model.kvspn is not None and not translator.model.drafts:
        print_warning(
            "the draft network is untrained (kvspn_draft_trained is false): its figures say nothing"
        )
    rows: list[Row] = []
    progress = _progress()
    with _decoder(translator, opened, ks, workers) as decode, progress:
        for name, clips in chosen.items():
            rows += score(name, progress.track(decode(clips), len(clips), description=name))
    Console().print(_table(rows))
    if output is not None:
        document = {
            "rows": [asdict(row) for row in rows],
            "machine": _machine(translator, opened[0], translator.weights or "fp32"),
        }
        output.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clips"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _evaluate_speech(
    manifest: Path,
    split: str | None,
    languages: list[str],
    limit: int | None,
    task: str,
    peers: bool,
    opened: Opened,
    output: Path | None,
) -> None:
    from importlib.util import find_spec

    from kvspn.speech.manifest import ManifestError, read_recordings

    if find_spec("jiwer") is None:
        raise typer.BadParameter("--speech needs jiwer: pip install 'kvspn[evaluate]' brings it")
    model, backend, weights, kv, draft = opened
    try:
        clips = read_recordings(manifest, split, languages)[:limit]
        formats = list(dict.fromkeys((weights or "fp32").split(",")))
        translator = open_translator(model, backend, formats[0], kv, draft)
        from kvspn.speech.recognition import Formats, check_recordings, judge, recognise

        check_recordings(clips, translator, task)
    except ManifestError as error:
        raise typer.BadParameter(f"--speech {error}") from error
    decoded = Formats(translator, formats, task)
    others, margins = _peers(translator, task) if peers else ({}, None)
    with _progress() as progress:
        outputs = list(progress.track(recognise(clips, decoded, others), len(clips), description=task))
    systems = judge(clips, outputs, translator.decode, task, margins)
    _print_systems(systems)
    drafting = _drafting(decoded.stats) if translator.model.drafts else {}
    _print_drafting(drafting)
    if output is not None:
        document = {
            "task": task,
            "split": split,
            "systems": [asdict(system) for system in systems],
            "drafting": {
                name: {code: asdict(x) for code, x in each.items()} for name, each in drafting.items()
            },
            "machine": _machine(translator, model, formats),
        }
        write_json(output, document)


def _peers(translator: Translator, task: str) -> tuple[dict[str, Recogniser], Any]:
    """Those that are here, by name and format, and how to have margins; a line for each that is not."""
    from kvspn.measure.peers import Skipped, load
    from kvspn.speech.peers import PEERS, as_whisper

    whisper = as_whisper(translator.model)
    prepared: dict[str, Recogniser] = {}
    margins = None
    for name in PEERS:
        try:
            module = load(name, "kvspn.speech.peers")
        except Skipped as reason:
            print_warning(reason)
            continue
        for fmt in module.FORMATS:
            peer = module.prepare(whisper, translator.processor, fmt, task)
            prepared[f"{name.replace('_', '-')} {fmt}"] = peer
            margins = getattr(peer, "margins", margins)
    return prepared, margins


def _print_systems(systems: list[System]) -> None:
    first = systems[0].languages
    headings = ["system", *(f"{language}, {score.measure}" for language, score in first.items()), "mean"]
    rows = [
        [system.name, *(f"{score.value:.2f}" for score in system.languages.values()), f"{system.mean:.2f}"]
        for system in systems
    ]
    if all(score.identical is not None for score in first.values()):
        headings.append("as transformers")
        clips = sum(score.clips for score in first.values())
        for row, system in zip(rows, systems, strict=True):
            row.append(f"{clips - len(system.differences)} of {clips}")
    print_table(headings, rows)


def _drafting(stats: Mapping[str, Mapping[str, list[DecodeStats]]]) -> dict[str, dict[str, DecodeStats]]:
    """Of each format the clips' figures by language, and of "all"."""
    from kvspn.decoding import DecodeStats

    summed = {}
    for name, languages in stats.items():
        clips = {code: languages[code] for code in sorted(languages)}
        clips["all"] = [each for rows in clips.values() for each in rows]
        summed[name] = {
            code: DecodeStats.total(rows, sum(each.seconds for each in rows)) for code, rows in clips.items()
        }
    return summed


def _print_drafting(drafting: Mapping[str, Mapping[str, DecodeStats]]) -> None:
    """How much of what the draft network guesses stands, and the tokens of a step."""
    for what, figure in (("accepted", "{0.acceptance:.1%}"), ("tokens/step", "{0.tokens_per_step:.2f}")):
        rows = [[name, *(figure.format(each) for each in found.values())] for name, found in drafting.items()]
        if rows:
            print_table([f"{what}, k = 1", *next(iter(drafting.values()))], rows)


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


def _machine(translator: Translator, model: Path | None, weights: str | list[str]) -> dict[str, Any]:
    from kvspn.measure.machine import cpu, gpu, versions

    return {
        "model": "mini (bundled)" if model is None else model.name,
        "parameters": translator.model.num_parameters(),
        "backend": translator.backend,
        "weights": weights,
        "kv": translator.kv,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "cpu": cpu(),
        "gpu": gpu(),
    }
