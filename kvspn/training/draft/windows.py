"""Clips of speech to windows, as a base model hears them: of one clip, or of several one after the other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvspn.models.validation import SAMPLING_RATE
from kvspn.training.draft.recipe import DraftRecipe

TOLERANCE = 0.1
"""Seconds by which a clip may be longer or shorter than it is said to be."""


@dataclass(frozen=True)
class Clip:
    """A recording with one speaker.

    name: of its file; language: its code, None where it is to be detected; speaker: None where not known.
    """

    name: str
    language: str | None
    speaker: str | None
    seconds: float


class Piece(NamedTuple):
    """A stretch of a clip: its number, and where it begins and ends in seconds; None is the clip's end."""

    clip: int
    start: float
    end: float | None


Window = list[Piece]
Load = Callable[[int], np.ndarray | None]
"""The samples of a clip by its number, float32 [N] at 16 kHz; None for one that cannot be read."""


def split_clips(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the clips for training, and of those that are held out: about `share` of the seconds.

    All clips of a speaker, or where none is known the clip alone, are on one side.

    Raises ValueError where that leaves nothing on a side.
    """
    voices: dict[str, list[int]] = defaultdict(list)
    for number, clip in enumerate(clips):
        voices[f"file {clip.name}" if clip.speaker is None else f"speaker {clip.speaker}"].append(number)
    if len(voices) < 2:
        raise ValueError(
            "audio must be of at least two speakers, or files where none is known, one of them to be held "
            f"out, got {len(voices)}"
        )
    seconds = {voice: sum(clips[number].seconds for number in numbers) for voice, numbers in voices.items()}
    order = sorted(voices)
    random.Random(seed).shuffle(order)
    left = share * sum(seconds.values())
    held_out = []
    for voice in order:
        if seconds[voice] <= left:
            left -= seconds[voice]
            held_out += voices[voice]
    held_out = held_out or voices[min(order, key=seconds.__getitem__)]
    return sorted(set(range(len(clips))) - set(held_out)), sorted(held_out)


def plan_windows(
    clips: Sequence[Clip], numbers: Iterable[int], seconds: float, recipe: DraftRecipe
) -> list[Window]:
    """Windows of at most `seconds` with all of the clips of these numbers, in a random order.

    A clip that is longer is cut; what is left of it under twice the tolerance is no window. Clips are joined
    with others of their language, where it is known.
    """
    rng = random.Random(recipe.seed)
    windows: list[Window] = []
    by_language: dict[str | None, list[int]] = defaultdict(list)
    for number in numbers:
        by_language[clips[number].language].append(number)
    for language, spoken in by_language.items():
        rng.shuffle(spoken)
        filled = 0.0
        joining = False
        for number in spoken:
            length = clips[number].seconds
            if length + TOLERANCE > seconds:
                starts = np.arange(0, max(length - 2 * TOLERANCE, TOLERANCE), seconds).tolist()
                windows += [[Piece(number, start, start + seconds)] for start in starts]
                joining = False
            elif joining and filled + length + TOLERANCE <= seconds:
                windows[-1].append(Piece(number, 0, None))
                filled += length + TOLERANCE
            else:
                windows.append([Piece(number, 0, None)])
                filled = length + TOLERANCE
                joining = language is not None and rng.random() < recipe.joined
    rng.shuffle(windows)
    return windows


def window_samples(window: Window, clips: Sequence[Clip], load: Load) -> np.ndarray | None:
    """float32 [N], what a window sounds like; None where one of its clips cannot be read.

    Raises ValueError for a clip that is not as long as it is said to be.
    """
    parts = []
    for number, start, end in window:
        samples = load(number)
        if samples is None:
            return None
        clip, length = clips[number], len(samples) / SAMPLING_RATE
        if abs(length - clip.seconds) > TOLERANCE:
            raise ValueError(
                f"{clip.name}: seconds must be the length of its audio, {length:.2f}, got {clip.seconds:.2f}"
            )
        last = None if end is None else round(end * SAMPLING_RATE)
        parts.append(samples[round(start * SAMPLING_RATE) : last])
    return np.concatenate(parts)
