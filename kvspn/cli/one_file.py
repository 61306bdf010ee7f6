"""Listening with a model in one file: the C++ library hears; torch and transformers are not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from kvspn.speech.subtitles import Timed


@dataclass(frozen=True)
class Heard:
    """A recording's text. document: of --output json, but for file, warnings and stats."""

    text: str
    segments: Sequence[Timed]
    document: dict[str, Any]
    stats: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)


class Hearer(NamedTuple):
    """A model that listens: hear(samples, on_text, on_chunk). domain: the only speech that it knows."""

    hear: Callable[[Any, Callable[[str], None], Callable[[int, int], None]], Heard]
    has_timestamps: bool
    domain: str | None


def is_one_file(model: Path) -> bool:
    """Whether --model names what `kvspn quantize` writes."""
    return model.suffix == ".safetensors" and model.is_file()


def by_the_library(
    path: Path, threads: int | None, spoken: str | None, target: str | None, given: Mapping[str, Any]
) -> Hearer:
    """The model of such a file, greedy; `given` are options that must be left out for it."""
    from kvspn.speech.one_file import OneFile

    for option, value in given.items():
        if value not in (None, False) and (option, value) != ("k", 1):
            raise typer.BadParameter(
                f"--{option} must be left out for a model in one file ({path.name}), got {value}"
            )
    try:
        model = OneFile(path, threads or 0)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--model {path}: {error}") from error
    targets = model.languages if target == spoken else model.targets
    for option, language, known in (("from", spoken, model.languages), ("to", target, targets)):
        if language is not None and language not in known:
            raise typer.BadParameter(f"--{option} must be one of {', '.join(known)}, got {language}")

    def hear(samples: Any, on_text: Callable[[str], None], on_chunk: Callable[[int, int], None]) -> Heard:
        found = model.transcribe(samples, spoken, target)
        on_text(found.text)
        fields = ("start", "end", "text", "tokens", "avg_logprob", "no_speech_prob")
        document = {
            "source": found.language,
            "sources": [found.language],
            "target": found.target,
            "language_probabilities": [{found.language: round(found.language_probability, 4)}],
            "text": found.text,
            "segments": [{name: getattr(each, name) for name in fields} for each in found.segments],
        }
        cut = [
            f"the text of {each.start:.2f} to {each.end:.2f} seconds is cut short"
            for each in found.segments
            if each.cut
        ]
        return Heard(found.text, found.segments, document, found.stats, cut)

    return Hearer(hear, model.has_timestamps, model.training_domain or None)
