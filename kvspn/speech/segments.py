"""Segments of a transcription, and how one window's tokens fall into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kvspn.models.segments import pairs

STEP = 0.02  # seconds from one timestamp to the next


@dataclass
class Word:
    """A word as it stands in the text, its space in front, with its times in seconds."""

    start: float
    end: float
    word: str
    probability: float


@dataclass
class Segment:
    """A stretch of speech with its text; the fields are those of faster-whisper.

    id: 1, 2, ... in the recording. seek: where its window began, in frames of 10 ms. start, end: seconds.
    tokens: text and timestamps. avg_logprob: mean logarithm of the tokens' probabilities, that of the end
    token among them, over the window. compression_ratio: bytes of the window's text over those that zlib
    makes of it. no_speech_prob: of the token after the start of the transcript. temperature: at which the
    tokens were drawn, 0 for greedy decoding. words: where they were asked for.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None
    temperature: float | None


class Piece(NamedTuple):
    """A segment in a window: seconds from the window's start, and tokens."""

    start: float
    end: float
    tokens: list[int]


def split(tokens: Sequence[int], begin: int, seconds: float) -> tuple[list[Piece], float]:
    """A window's tokens as segments, and the seconds of the window that they account for.

    As OpenAI's Whisper cuts them: a segment lies between a timestamp and the second of the pair that ends it.
    After the last pair, what has no end of its own was cut off by the window and is left to the next, which
    begins there; what ends in a single timestamp was the last that is said in this one.

    Args:
        tokens: generated ones, without the end token.
        begin: the token of 0.00 s; all above are timestamps.
        seconds: how much of the window is sound.
    """

    def time(token: int) -> float:
        return (token - begin) * STEP

    cuts = pairs(tokens, begin)
    if not cuts:
        times = [time(token) for token in tokens if token > begin]
        return [Piece(0.0, times[-1] if times else seconds, list(tokens))], seconds
    finished = ends_once(tokens, begin)
    ends = [*cuts, len(tokens)] if finished else cuts
    parts = [list(tokens[start:end]) for start, end in pairwise([0, *ends])]
    # With the grammar of timestamps a part begins and ends with one.
    pieces = [Piece(max(0.0, time(part[0])), max(0.0, time(part[-1])), part) for part in parts]
    # Without a step forward the same window would come again, for ever.
    heard = seconds if finished else pieces[-1].end or seconds
    return pieces, heard


def ends_once(tokens: Sequence[int], begin: int) -> bool:
    """Whether a window's tokens end in a single timestamp, behind which nothing is said."""
    return len(tokens) > 1 and tokens[-2] < begin <= tokens[-1]
