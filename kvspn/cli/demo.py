"""`kvspn demo`: the bundled clips into the other languages, greedy and with KVSPN side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvspn.cli.common import Backend, Model, Threads, open_translator

if TYPE_CHECKING:
    from kvspn.decoding import DecodeStats
    from kvspn.speech.translator import Translation

    Pair = tuple[Translation, Translation]  # greedy, KVSPN

_NOTE = (
    "The figure that counts here is tokens per step. The miniature's weights fit into the cache of a "
    "processor, so its milliseconds say little about a model of real size, where reading the weights is "
    "what a step costs."
)


def demo(model: Model = None, backend: Backend = None, threads: Threads = None) -> None:
    """Translate the bundled clips: greedy and with KVSPN, side by side.

    A clip in each of the six languages goes into the other five, once by plain greedy decoding and once with
    KVSPN at k = 1, which must give exactly the same text.
    """
    from kvspn.assets import read_manifest
    from kvspn.speech.audio import load_audio

    clips = read_manifest("demo")
    translator = open_translator(model, backend, threads=threads)
    console = Console()
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
