"""`kvspn translate`: audio files to text in another language."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvspn.cli.common import KV, Backend, K, Model, Weights, muted_stderr, open_translator, print_error

if TYPE_CHECKING:
    from kvspn.speech.translator import Translation

_STATS = ("tokens", "steps", "drafted", "accepted", "acceptance", "tokens_per_step", "alpt_ms", "seconds")


def translate(
    audio: Annotated[
        list[Path],
        typer.Argument(
            metavar="AUDIO...",
            help="Audio files with speech: wav, flac, mp3 or ogg, of any rate, channel count and length.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            "--to", metavar="LANGUAGE", help="Translate to: en, zh, de, es, fr or it.", show_default=False
        ),
    ],
    source: Annotated[
        str,
        typer.Option("--from", metavar="LANGUAGE", help="The language spoken; auto detects it in each file."),
    ] = "auto",
    k: K = "1",
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Decode without the draft network: plain and greedy.")
    ] = False,
    model: Model = None,
    backend: Backend = None,
    weights: Weights = None,
    kv: KV = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document: a list with text and figures of each file."),
    ] = False,
) -> None:
    """Translate speech to text.

    To the language that is spoken, this transcribes. Audio longer than the model's window is cut at pauses.

    Example: kvspn translate talk.mp3 --to de
    """
    from kvspn.speech.audio import AudioError, load_audio

    translator = open_translator(model, backend, weights, kv)
    for code in {target, source} - {"auto"}:
        translator.check_language(code)
    live = sys.stdout.isatty() and not as_json  # text as it comes; the progress bar is for the other cases
    documents = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,
        disable=live or not sys.stderr.isatty(),
    ) as progress:
        for path in audio:
            try:
                with muted_stderr():
                    samples = load_audio(path)
            except AudioError as error:
                print_error(error)
                continue
            prefix = f"{path}: " if len(audio) > 1 else ""
            if live:
                typer.echo(prefix, nl=False)
            result = translator.translate(
                samples,
                target,
                None if source == "auto" else source,
                k=k,
                draft=not no_draft,
                on_text=_show if live else lambda text: None,
                on_chunk=partial(_advance, progress, progress.add_task(path.name, total=None)),
            )
            stats = {name: getattr(result.total, name) for name in _STATS}
            documents.append(
                {
                    "file": str(path),
                    "source": result.source,
                    "target": result.target,
                    "text": result.text,
                    "stats": stats,
                }
            )
            if live:
                typer.echo()
                typer.echo(typer.style(_summary(result), dim=True), err=True)
            elif not as_json:
                typer.echo(prefix + result.text)
    if as_json:
        typer.echo(json.dumps(documents, ensure_ascii=False, indent=2))
    if len(documents) < len(audio):
        raise typer.Exit(1)


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _summary(result: Translation) -> str:
    total = result.total
    return (
        f"{result.source} → {result.target}: {total.tokens} tokens in {total.steps} steps, "
        f"{total.acceptance:.0%} of the guesses accepted, {total.alpt_ms:.1f} ms a token"
    )


def _show(text: str) -> None:
    typer.echo(text, nl=False)
