"""`--live` of `kvspn transcribe` and `kvspn translate`: text while the speech is spoken."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from kvspn.cli.common import open_translator, print_error, print_warning

if TYPE_CHECKING:
    import numpy as np

    from kvspn.speech.stream import Update

Every = Annotated[
    float | None,
    typer.Option(
        "--live",
        metavar="SECONDS",
        min=0.1,
        help="Decode while the speech comes, from - or a pipe, so often: text that will not change goes to "
        "stdout, on a terminal the rest below it. --output json: an update a line, txt: a segment a line.",
        show_default=False,
    ),
]
Raw = Annotated[
    int | None,
    typer.Option(
        "--raw",
        metavar="HZ",
        min=1_000,
        max=768_000,
        help="With --live: standard input is headerless 16-bit mono samples (s16le) of this rate.",
        show_default=False,
    ),
]


def listen_live(
    audio: Sequence[Path],
    target: str | None,
    task: str | None,
    source: str,
    output: str | None,
    *,
    seconds: float,
    raw: int | None,
    prompt: str | None,
    hotwords: str | None,
    k: int | str,
    no_draft: bool,
    refused: dict[str, object],
    **model: Any,
) -> None:
    """Runs a command on one stream. `refused`: options that a stream does not honour, by name."""
    if len(audio) != 1:
        raise typer.BadParameter(f"--live takes one AUDIO, got {len(audio)}")
    if output not in (None, "txt", "json"):
        raise typer.BadParameter(f"--output must be txt or json with --live, got {output}")
    for option, value in refused.items():
        if value:
            raise typer.BadParameter(f"{option} must be left out with --live")
    (path,) = audio
    piped = str(path) == "-" or path.is_fifo()
    if raw is not None and not piped:
        raise typer.BadParameter(f"--raw must be left out for {path}, which is no pipe")
    from kvspn.speech.audio import SAMPLING_RATE, AudioError, live_audio
    from kvspn.speech.stream import Stream
    from kvspn.speech.windows import Choice

    translator = open_translator(**model)
    spoken = None if source == "auto" else source
    translator.check_languages("en" if target is None and task == "translate" else target, spoken)
    if not translator.windows.has_timestamps:
        raise typer.BadParameter("--live must be left out for this model, which has no timestamps")
    stream = Stream(
        translator.windows,
        spoken,
        target,
        task=task,
        initial_prompt=prompt,
        hotwords=hotwords,
        choice=Choice((0.0,), k=k, draft=not no_draft),
    )
    wanted = round(seconds * SAMPLING_RATE)
    failed = None
    with _Shown(output) as show:
        try:
            with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
                blocks = live_audio(file, raw, print_warning)
                for samples in _as_they_come(blocks, wanted) if piped else _parts(blocks, wanted):
                    show(stream.feed(samples))
        except KeyboardInterrupt:
            pass  # how a microphone is switched off
        except (AudioError, OSError) as error:
            failed = error
        show(stream.finish())  # What came before the end counts, whatever ended it.
    if failed is not None:
        print_error(failed)
        raise typer.Exit(1)


def _parts(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """So many samples at a time, and the rest."""
    import numpy as np

    part = np.zeros(0, np.float32)
    for block in blocks:
        part = np.concatenate([part, block])
        while len(part) >= size:
            yield part[:size]
            part = part[size:]
    if len(part):
        yield part


def _as_they_come(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """So many samples at least, and what else came meanwhile: nobody who writes to the pipe has to wait."""
    import numpy as np

    come: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for block in blocks:
                come.put(block)
            come.put(None)
        except BaseException as error:
            come.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        parts: list[np.ndarray] = []
        while not ended and (sum(map(len, parts)) < size or not come.empty()):
            block = come.get()
            if isinstance(block, BaseException):
                raise block
            ended = block is None
            if block is not None:
                parts.append(block)
        if parts:
            yield np.concatenate(parts)


class _Shown:
    """Updates on stdout: on a terminal a line a segment, and below them the text that may change."""

    def __init__(self, output: str | None) -> None:
        self._output = output
        self._below = Live(transient=True) if output is None and sys.stdout.isatty() else None
        self._begun = False

    def __enter__(self) -> _Shown:
        if self._below:
            self._below.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._below:
            self._below.stop()
        elif self._output is None:
            typer.echo()

    def __call__(self, update: Update) -> None:
        if self._output == "json":
            line = {
                "stable": update.stable,
                "unstable": update.unstable,
                "language": update.language,
                "segments": [asdict(segment) for segment in update.segments],
                "stats": asdict(update.stats),
            }
            typer.echo(json.dumps(line, ensure_ascii=False))
        elif self._below or self._output == "txt":
            if self._below:  # first, or a stable text would stand twice for a moment
                self._below.update(Text(update.unstable.strip(), style="dim"), refresh=True)
            for segment in update.segments:
                self._line(segment.text.strip())
        else:  # running text
            typer.echo(update.stable if self._begun else update.stable.lstrip(), nl=False)
            self._begun |= bool(update.segments)
        sys.stdout.flush()

    def _line(self, text: str) -> None:
        if self._below:
            self._below.console.print(Text(text))
        else:
            typer.echo(text)
