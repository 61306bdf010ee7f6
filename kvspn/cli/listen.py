"""What `kvspn transcribe` and `kvspn translate` share: audio files in, text or subtitles out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvspn.atomic import atomic
from kvspn.cli.common import open_translator, print_error, print_json, print_warning
from kvspn.cli.live import listen_live
from kvspn.cli.one_file import Heard, Hearer, by_the_library, is_one_file

if TYPE_CHECKING:
    from kvspn.speech.translator import Translator

_STATS = ("tokens", "steps", "drafted", "accepted", "acceptance", "tokens_per_step", "alpt_ms", "seconds")
_MOST_FAILURES = 100  # of the exit status, which a shell cuts at 255 and fills from 126 on
AUDIO = {
    *("aac", "aiff", "flac", "m4a", "m4b", "mka", "mkv", "mov", "mp3", "mp4", "mpga", "oga", "ogg", "opus"),
    *("wav", "webm", "wma"),
}


class Output(str, Enum):
    """Forms of a transcription."""

    TXT = "txt"
    SRT = "srt"
    VTT = "vtt"
    TSV = "tsv"
    JSON = "json"


Audio = Annotated[
    list[Path],
    typer.Argument(
        metavar="AUDIO...",
        help="Audio files with speech: wav, flac, mp3, ogg, m4a, webm, ... of any rate, channel count and "
        "length; a folder: those in it; - for standard input.",
        show_default=False,
    ),
]
Source = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="LANGUAGE",
        help="The language spoken; auto detects it at the start, with a model without timestamps in each "
        "stretch of a file.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="What went before: topic, spelling of names, style.",
        show_default=False,
    ),
]
Hotwords = Annotated[
    str | None, typer.Option("--hotwords", metavar="WORDS", help="Words to expect.", show_default=False)
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", metavar="TEXT", help="How the text begins.", show_default=False)
]
Words = Annotated[
    bool,
    typer.Option("--words", help="With --output json: the words of each segment, with times."),
]
NoDraft = Annotated[
    bool, typer.Option("--no-draft", help="Decode without the draft network: plain and greedy.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse a file of which something is lost: cut short, or damaged.")
]
As = Annotated[
    Output | None,
    typer.Option(
        "--output",
        help="Instead of running text: a line a segment, subtitles, a table of milliseconds, or one JSON "
        "document, a list with text, segments and figures, or the error, of each file.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Write each file's --output there, under the file's name.",
        show_default=False,
    ),
]


def listen(
    audio: Sequence[Path],
    target: str | None,
    task: str | None,
    source: str,
    output: Output | None,
    folder: Path | None,
    *,
    model: Path | None,
    draft: Path | None,
    backend: str | None,
    weights: str | None,
    kv: str | None,
    encoder_format: str | None,
    threads: int | None,
    strict: bool,
    no_draft: bool,
    words: bool,
    live: float | None,
    raw: int | None,
    **options: Any,
) -> None:
    """Runs a command; `options` are others of `Translator.translate`.

    A file that fails stops no other; the exit status is the number of those that did, 100 at most.
    """
    one_file = model is not None and is_one_file(model)
    if live is not None:
        if one_file:
            raise typer.BadParameter(f"--live must be left out for a model in one file, got {live:g}")
        listen_live(
            audio,
            target,
            task,
            source,
            None if output is None else output.value,
            seconds=live,
            raw=raw,
            no_draft=no_draft,
            refused={
                "--words": words,
                "--strict": strict,
                "--folder": folder,
                "--prefix": options.pop("prefix"),
            },
            model=model,
            draft=draft,
            backend=backend,
            weights=weights,
            kv=kv,
            encoder_format=encoder_format,
            threads=threads,
            **options,
        )
        return
    if raw is not None:
        raise typer.BadParameter(f"--raw must be left out without --live, got {raw}")
    if words and output is not Output.JSON:
        raise typer.BadParameter(
            f"--output must be json with --words, got {output.value if output else 'running text'}"
        )
    files = list(_files(audio))
    written = _written(files, output, folder)
    from kvspn.assets import is_bundled
    from kvspn.speech.audio import AudioError, load_audio
    from kvspn.speech.subtitles import WRITERS

    spoken = None if source == "auto" else source
    wanted = "en" if target is None and task == "translate" else target
    if model is not None and one_file:
        given = {"draft": draft, "backend": backend, "weights": weights, "kv": kv, "words": words}
        given |= {"encoder-format": encoder_format, "no-draft": no_draft, **options}
        hearer = by_the_library(model, threads, spoken, wanted, given)
    else:
        translator = open_translator(model, backend, weights, kv, draft, threads, encoder_format)
        translator.check_languages(wanted, spoken)
        options |= {"task": task, "draft": not no_draft, "word_timestamps": words}
        options |= {"probabilities": output is Output.JSON}
        hearer = _by_translator(translator, target, spoken, options)
    if output in (Output.SRT, Output.VTT, Output.TSV) and not hearer.has_timestamps:
        raise typer.BadParameter(
            f"--output must be txt or json for this model, which has no timestamps; got {output.value}"
        )
    if words and not hearer.has_timestamps:
        raise typer.BadParameter("--words must be left out for this model, which has no timestamps")
    domain = hearer.domain
    running = sys.stdout.isatty() and output is None  # text as it comes; else a progress bar
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
            disable=running or not sys.stderr.isatty(),
        ) as progress:
            for path, into in zip(files, written, strict=True):
                warnings: list[str] = []
                label = f"{path}: " if len(files) > 1 else ""
                shown = _Shown(label if running else None)
                try:
                    if path.is_dir():
                        raise AudioError(f"{path}: no audio files in it ({', '.join(sorted(AUDIO))})")
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
                    heard = hearer.hear(
                        samples, shown, partial(_advance, progress, progress.add_task(path.name, total=None))
                    )
                    for line in heard.warnings:
                        print_warning(f"{path}: {line}")
                        warnings.append(f"{path}: {line}")
                    document = {"file": str(path), **heard.document}
                    document |= {"warnings": warnings, "stats": heard.stats}
                    if output is Output.JSON:
                        text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
                    elif output is not None and hearer.has_timestamps:
                        text = WRITERS[output.value](heard.segments)
                    else:
                        text = heard.text + "\n"
                    if into is not None:
                        with atomic(into) as part:
                            part.write_text(text, "utf-8")
                except Exception as error:
                    failed += 1
                    shown.end()
                    line = str(error) if isinstance(error, AudioError) else f"{path}: {_reason(error)}"
                    print_error(line)
                    documents.append({"file": str(path), "error": line})
                    continue
                shown.end()
                documents.append(document)
                if running:
                    typer.echo(typer.style(_summary(heard), dim=True), err=True)
                elif output is None:
                    typer.echo(label + heard.text)
                elif into is None and output is not Output.JSON:
                    typer.echo(text, nl=False)
    finally:  # also where Ctrl-C ends it
        if output is Output.JSON and folder is None:
            print_json(documents)
    if failed:
        raise typer.Exit(min(failed, _MOST_FAILURES))


def _by_translator(translator: Translator, target: str | None, spoken: str | None, options: Any) -> Hearer:
    def hear(samples: Any, on_text: Any, on_chunk: Any) -> Heard:
        found = translator.translate(samples, target, spoken, on_text=on_text, on_chunk=on_chunk, **options)
        document = {
            "source": found.source,
            "sources": found.sources,
            "target": found.target,
            "language_probabilities": [_likely(each) for each in found.probabilities],
            "text": found.text,
            "segments": [asdict(segment) for segment in found.segments],
        }
        stats = {name: getattr(found.total, name) for name in _STATS}
        return Heard(found.text, found.segments, document, stats)

    return Hearer(hear, translator.windows.has_timestamps, translator.model.config.training_domain)


def _files(audio: Sequence[Path]) -> Iterator[Path]:
    """The files that are meant, those in a folder in the order of their names."""
    for path in audio:
        if not path.is_dir():
            yield path
            continue
        # A folder without any stays, for its own error: it stops no file beside it.
        yield from [each for each in sorted(path.iterdir()) if each.suffix[1:].lower() in AUDIO] or [path]


def _written(files: Sequence[Path], output: Output | None, folder: Path | None) -> list[Path | None]:
    """Where the output of each file goes; None for stdout."""
    if folder is None:
        if output not in (None, Output.JSON) and len(files) > 1:
            raise typer.BadParameter(f"--folder must be given for {len(files)} files in {output.value}")
        return [None] * len(files)
    if output is None:
        raise typer.BadParameter("--folder must be given with --output")
    written: dict[Path, Path] = {}
    for path in files:
        into = folder / f"{'stdin' if str(path) == '-' else path.stem}.{output.value}"
        if (other := written.setdefault(into, path)) is not path:
            raise typer.BadParameter(f"--folder would hold {into.name} of both {other} and {path}")
    folder.mkdir(parents=True, exist_ok=True)
    return list(written)


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


def _likely(probabilities: dict[str, float]) -> dict[str, float]:
    """Those of a thousandth or more, and the first."""
    return {
        language: round(probability, 4)
        for i, (language, probability) in enumerate(probabilities.items())
        if not i or probability >= 0.001
    }


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _summary(heard: Heard) -> str:
    document, stats = heard.document, heard.stats
    took = f", {stats['alpt_ms']:.1f} ms a token" if "alpt_ms" in stats else ""
    return (
        f"{', '.join(dict.fromkeys(document['sources']))} → {document['target']}: "
        f"{stats['tokens']} tokens in {stats['steps']} steps, "
        f"{stats['acceptance']:.0%} of the guesses accepted{took}"
    )
