"""A model in one file, as `kvspn quantize` writes it, heard by the C++ library: no torch, no transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from os import PathLike

import numpy as np
from safetensors import safe_open

from kvspn import _native


@dataclass(frozen=True)
class Text:
    """What is said in a recording.

    segments: as the library gives them (`kvspn_segment`). language: the one spoken, and its probability, 1
    where it was given; target: the text's. stats: tokens, steps, drafted and accepted ones, seconds in all.
    """

    segments: list[_native.Segment]
    language: str
    language_probability: float
    target: str
    stats: dict[str, int | float]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


class OneFile:
    """Decodes recordings of any length, greedy, window after window (`kvspn_transcribe`).

    Attributes:
        languages: codes of those it knows; targets: of those that a text can be translated to.
        has_timestamps: whether segments are the model's own, or windows.
        training_domain: what alone a miniature knows; "" for any speech.

    Raises:
        ValueError, OSError: a file that is damaged, of another kind, or not there.
    """

    def __init__(self, path: str | PathLike[str], threads: int = 0) -> None:
        """threads: 0 for the cores that the process may keep busy."""
        self._model = _native.Model(str(path), threads=threads)
        with safe_open(path, "np") as file:
            said = file.metadata()
            (vocabulary,) = file.get_slice("mask").get_shape()
        self.languages = sorted(_after("language.", said)) or ["en"]
        self.targets = sorted(_after("target.", said))
        self.has_timestamps = vocabulary > int(said["no_timestamps"]) + 1
        self.training_domain = said.get("training_domain", "")

    def transcribe(self, samples: np.ndarray, language: str | None = None, target: str | None = None) -> Text:
        """Samples [N] at 16 kHz, mono, finite -> text.

        language: what is spoken, its code; None detects it in the first window. target: the code of what to
        translate to; None is the language spoken.
        """
        begin = time.perf_counter()
        segments = self._model.transcribe(
            np.ascontiguousarray(samples, np.float32), language=language, target=target
        )
        seconds = time.perf_counter() - begin
        spoken = segments[0].language if segments else language or self.languages[0]
        likely = segments[0].language_probability if segments else 1.0
        tokens, steps, drafted, accepted = self._model.statistics
        stats: dict[str, int | float] = {
            "tokens": tokens,
            "steps": steps,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance": accepted / drafted if drafted else 0.0,
            "tokens_per_step": tokens / steps if steps else 0.0,
            "seconds": seconds,
        }
        return Text(segments, spoken, likely, target or spoken, stats)


def _after(prefix: str, names: dict[str, str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
