"""Words of a window with their times, and what of them makes a text look invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median
from typing import NamedTuple

from transformers import WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import (
    _split_tokens_on_spaces,
    _split_tokens_on_unicode,
)

from kvspn.speech.segments import Segment, Word

_WITHOUT_SPACES = {"zh", "ja", "th", "lo", "my", "yue"}
_SENTENCE_ENDS = ".。!！?？"
_LONGEST_MEDIAN = 0.7  # seconds


@dataclass(frozen=True)
class Punctuation:
    """Marks that belong to the word behind them, and to that in front."""

    before: str = "\"'“¿([{-"
    after: str = "\"'.。,，!！?？:：”)]}、"


class Timing(NamedTuple):
    """Of a window's N text tokens: seconds at which each begins and the last one ends [N + 1], and the
    probabilities [N]."""

    starts: list[float]
    probabilities: list[float]


def words(
    tokenizer: WhisperTokenizer,
    parts: Sequence[Sequence[int]],
    timing: Timing,
    language: str,
    punctuation: Punctuation,
) -> tuple[list[list[Word]], float]:
    """The words of each part of a window's text, and the median of their lengths, 0.7 s at most.

    As OpenAI's Whisper makes them, but that no word reaches from one part into the next: a word that ends a
    sentence, or begins one, is no longer than two medians, since the pause beside it belongs to none; then
    marks join their words, whose times stay.

    Args:
        parts: text tokens of each segment, the first at the beginning of the text.
    """
    split = _split_tokens_on_unicode if language in _WITHOUT_SPACES else _split_tokens_on_spaces
    found: list[list[Word]] = []
    first = 0
    for tokens in parts:
        found.append([])
        texts, pieces, _ = split(tokenizer, list(tokens))
        for text, piece in zip(texts, pieces, strict=True):
            last = first + len(piece)
            probability = mean(timing.probabilities[first:last])
            found[-1].append(Word(timing.starts[first], timing.starts[last], text, probability))
            first = last
    every = [word for part in found for word in part]
    lengths = [word.end - word.start for word in every if word.end > word.start]
    usual = min(_LONGEST_MEDIAN, median(lengths)) if lengths else 0.0
    for before, word in pairwise(every if lengths else []):
        if word.end - word.start > 2 * usual:
            if word.word in _SENTENCE_ENDS:
                word.end = word.start + 2 * usual
            elif before.word in _SENTENCE_ENDS:
                word.start = word.end - 2 * usual
    return [_joined(part, punctuation) for part in found], usual


def _joined(found: Sequence[Word], punctuation: Punctuation) -> list[Word]:
    """Marks with their words."""
    backwards: list[Word] = []
    for word in reversed(found):
        if backwards and word.word.startswith(" ") and word.word.strip() in punctuation.before:
            backwards[-1] = replace(backwards[-1], word=word.word + backwards[-1].word)
        else:
            backwards.append(word)
    joined: list[Word] = []
    for word in reversed(backwards):
        if joined and not joined[-1].word.endswith(" ") and word.word in punctuation.after:
            joined[-1] = replace(joined[-1], word=joined[-1].word + word.word)
        else:
            joined.append(word)
    return joined


def give(segments: Sequence[Segment], found: Sequence[list[Word]], usual: float, spoken: float) -> None:
    """Give segments their words, and the segments the times of these.

    Args:
        found: of each segment, their times in seconds of the recording.
        usual: the median of their lengths.
        spoken: where the speech before these segments ended.
    """
    for segment, own in zip(segments, found, strict=True):
        segment.words = own
        if not own:
            continue
        _settle(segment, own, usual, spoken)
        for word in own:
            word.start, word.end = round(word.start, 2), round(word.end, 2)
        segment.start, segment.end = round(segment.start, 3), round(segment.end, 3)
        spoken = segment.end


def ended(segments: Sequence[Segment], spoken: float) -> float:
    """Where the speech of segments ends by their words; where none has words, the end of that before them."""
    return next((segment.end for segment in reversed(segments) if segment.words), spoken)


def _settle(segment: Segment, found: list[Word], usual: float, spoken: float) -> None:
    """Behind a pause the first words are no longer than two medians; where the first or last word reaches
    half a second beyond the segment, the segment is right, and else the word."""
    first, last = found[0], found[-1]
    if first.end - spoken > 4 * usual and (
        first.end - first.start > 2 * usual or (len(found) > 1 and found[1].end - first.start > 4 * usual)
    ):
        if len(found) > 1 and found[1].end - found[1].start > 2 * usual:
            first.end = found[1].start = max(found[1].end / 2, found[1].end - 2 * usual)
        first.start = max(0.0, first.end - 2 * usual)
    if segment.start < first.end and segment.start - 0.5 > first.start:
        first.start = max(0.0, min(first.end - usual, segment.start))
    else:
        segment.start = first.start
    if segment.end > last.start and segment.end + 0.5 < last.end:
        last.end = max(last.start + usual, segment.end)
    else:
        segment.end = last.end


def looks_invented(segment: Segment | None) -> bool:
    """Whether the first words of a segment are too unlikely, too short or too long for speech."""
    if segment is None or not segment.words:
        return False
    marks = Punctuation.before + Punctuation.after
    found = [word for word in segment.words if word.word not in marks][:8]
    strangeness = sum(map(_strangeness, found))
    return strangeness >= 3 or strangeness + 0.01 >= len(found)


def doubt(
    segments: Sequence[Segment],
    spoken: float,
    window: tuple[float, float, float],
    end: float,
    threshold: float,
) -> tuple[int, float] | None:
    """Of a window's segments how many stand in front of one that looks invented and has silence on both
    sides, and the second at which to listen again; None: all stand.

    Args:
        spoken: where the speech before the window ended.
        window: its start, the end of its sound, and the end that it has when it is full, in seconds.
        end: of what is listened to.
        threshold: seconds that are silence, where nothing is said.
    """
    start, sound, full = window
    said = [(i, segment) for i, segment in enumerate(segments) if segment.words]
    if said and looks_invented(said[0][1]) and said[0][1].start - start > threshold:
        return 0, said[0][1].start  # Without the silence before it, it may turn out to be right.
    for (i, segment), behind in zip(said, [*(each for _, each in said[1:]), None], strict=True):
        if looks_invented(segment):
            begins = behind.words[0].start if behind is not None and behind.words else sound
            silence_before = segment.start - spoken > threshold or segment.start < max(threshold, start + 2)
            silence_after = (
                begins - segment.end > threshold or looks_invented(behind) or full - segment.end < 2
            )
            if silence_before and silence_after:
                return i, end if end - segment.end < threshold else max(start + 1, segment.start)
        spoken = segment.end
    return None


def _strangeness(word: Word) -> float:
    length = word.end - word.start
    strange = float(word.probability < 0.15)
    if length < 0.133:
        strange += (0.133 - length) * 15
    return strange + max(0.0, length - 2)
