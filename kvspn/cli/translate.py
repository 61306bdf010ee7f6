"""`kvspn translate`: audio files to text in another language."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvspn.cli.common import (
    KV,
    Backend,
    K,
    Model,
    Task,
    Threads,
    Weights,
    open_translator,
    print_error,
    print_json,
    print_warning,
)

if TYPE_CHECKING:
    from kvspn.speech.translator import Translation

_STATS = ("tokens", "steps", "drafted", "accepted", "acceptance", "tokens_per_step", "alpt_ms", "seconds")
_MOST_FAILURES = 100  # of the exit status, which a shell cuts at 255 and fills from 126 on


def translate(
    audio: Annotated[
        list[Path],
        typer.Argument(
            metavar="AUDIO...",
            help="Audio files with speech: wav, flac, mp3, ogg, m4a, ... of any rate, channel count and "
            "length; - for standard input.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="LANGUAGE",
            help="Translate to a language that the model was taught: en, de, german, ...; a Whisper: en.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option("--task", help="Instead of --to: text in the language spoken, or in English."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="LANGUAGE",
            help="The language spoken; auto detects it in each stretch of a file.",
        ),
    ] = "auto",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="What went before: topic, spelling of names, style.",
            show_default=False,
        ),
    ] = None,
    hotwords: Annotated[
        str | None,
        typer.Option("--hotwords", metavar="WORDS", help="Words to expect.", show_default=False),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="TEXT", help="How the text begins.", show_default=False),
    ] = None,
    k: K = "1",
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Decode without the draft network: plain and greedy.")
    ] = False,
    model: Model = None,
    backend: Backend = None,
    weights: Weights = None,
    kv: KV = None,
    threads: Threads = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a file of which something is lost: cut short, or damaged."),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON document: a list with text and figures, or the error, of each file.",
        ),
    ] = False,
) -> None:
    """Translate speech to text.

    To the language that is spoken, this transcribes. Audio longer than the model's window is cut at pauses.
    A file that fails stops no other; the exit status is the number of those that did, 100 at most.

    Example: kvspn translate talk.mp3 --to de
    """
    from kvspn.assets import is_bundled
    from kvspn.speech.audio import AudioError, load_audio

    if target is None and task is None:
        raise typer.BadParameter("give --to LANGUAGE, or --task transcribe or translate")
    if target is not None and task is Task.TRANSCRIBE:
        raise typer.BadParameter(f"--to must not be given with --task transcribe; got {target}")
    translator = open_translator(model, backend, weights, kv, threads)
    spoken = None if source == "auto" else source
    translator.check_languages("en" if target is None and task is Task.TRANSLATE else target, spoken)
    domain = translator.model.config.training_domain
    live = sys.stdout.isatty() and not as_json  # text as it comes; the progress bar is for the other cases
    documents: list[dict[str, Any]] = []
    failed = 0
    try:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            disable=live or not sys.stderr.isatty(),
        ) as progress:
            for path in audio:
                warnings: list[str] = []
                label = f"{path}: " if len(audio) > 1 else ""
                shown = _Shown(label if live else None)
                try:
                    samples = load_audio(
                        sys.stdin.buffer if str(path) == "-" else path, strict=strict, on_loss=warnings.append
                    )
                    if domain and not is_bundled(path):
                        warnings.append(
                            f"{path}: this model knows {domain}: of other speech its text is a guess"
                        )
                        domain = None  # once is enough
                    for line in warnings:
                        print_warning(line)
                    result = translator.translate(
                        samples,
                        target,
                        spoken,
                        task=None if task is None else task.value,
                        prompt=prompt,
                        hotwords=hotwords,
                        prefix=prefix,
                        probabilities=as_json,
                        k=k,
                        draft=not no_draft,
                        on_text=shown,
                        on_chunk=partial(_advance, progress, progress.add_task(path.name, total=None)),
                    )
                except Exception as error:
                    failed += 1
                    shown.end()
                    line = str(error) if isinstance(error, AudioError) else f"{path}: {_reason(error)}"
                    print_error(line)
                    documents.append({"file": str(path), "error": line})
                    continue
                shown.end()
                documents.append(_document(path, result, warnings))
                if live:
                    typer.echo(typer.style(_summary(result), dim=True), err=True)
                elif not as_json:
                    typer.echo(label + result.text)
    finally:  # also where Ctrl-C ends it
        if as_json:
            print_json(documents)
    if failed:
        raise typer.Exit(min(failed, _MOST_FAILURES))


class _Shown:
    """Text on the terminal as it comes."""

    def __init__(self, label: str | None) -> None:
        """label: what goes before a file's text; None to show nothing."""
        self._label = label
        self._open = False  # in the middle of a line

    def __call__(self, text: str) -> None:
        if self._label is not None:
            typer.echo(text if self._open else self._label + text, nl=False)
            self._open = True

    def end(self) -> None:
        """Ends the line, where there is one."""
        if self._open:
            typer.echo()


def _reason(error: Exception) -> str:
    """What to say of an error: those that name no input also need their kind."""
    text = str(error)
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def _document(path: Path, result: Translation, warnings: list[str]) -> dict[str, Any]:
    return {
        "file": str(path),
        "source": result.source,
        "sources": result.sources,
        "target": result.target,
        "language_probabilities": [_likely(each) for each in result.probabilities],
        "text": result.text,
        "warnings": warnings,
        "stats": {name: getattr(result.total, name) for name in _STATS},
    }


def _likely(probabilities: dict[str, float]) -> dict[str, float]:
    """Those of a thousandth or more, and the first."""
    return {
        language: round(probability, 4)
        for i, (language, probability) in enumerate(probabilities.items())
        if not i or probability >= 0.001
    }


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _summary(result: Translation) -> str:
    total = result.total
    return (
        f"{', '.join(dict.fromkeys(result.sources))} → {result.target}: "
        f"{total.tokens} tokens in {total.steps} steps, "
        f"{total.acceptance:.0%} of the guesses accepted, {total.alpt_ms:.1f} ms a token"
    )
