"""A recording of any length to segments, window after window, as OpenAI's Whisper moves through it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvspn.speech.segments import Piece, Segment, ends_once, split
from kvspn.speech.windows import Choice, Heard, Windows, is_silence
from kvspn.speech.words import Punctuation, doubt, ended, give, words


@dataclass(frozen=True)
class Task:
    """What is wanted of a recording, as `kvspn.WhisperModel.transcribe` says it.

    target: the language to translate to; None is the one that is spoken. initial_prompt: tokens. window:
    frames that are listened to at once. clips: where to listen, in seconds, as start and end. punctuation:
    how marks join words. hallucination_silence_threshold: seconds of silence on either side of words that
    look invented, from which on they are; None: they are believed.
    """

    language: str
    task: str
    target: str | None
    initial_prompt: Sequence[int]
    choice: Choice
    window: int
    prefix: str | None = None
    hotwords: str | None = None
    condition_on_previous_text: bool = True
    prompt_reset_on_temperature: float = 0.5
    multilingual: bool = False
    clips: Sequence[tuple[float, float]] = ((0.0, math.inf),)
    punctuation: Punctuation = field(default_factory=Punctuation)
    hallucination_silence_threshold: float | None = None


def transcribe(
    windows: Windows,
    features: Tensor,
    task: Task,
    on_window: Callable[[Heard, int], object] = lambda heard, seek: None,
) -> Iterator[Segment]:
    """The segments of a recording, each as soon as its window is decoded.

    A window of the model's width is decoded with timestamps; its whole segments stand, and the next window
    begins where the last of them ends. The text so far is the prompt of the next window, unless a high
    temperature was needed, which says that it is not to be relied on.

    Args:
        features: [mel bins, frames] of the recording, from `windows.features`.
        on_window: called with what was made of each window, and the frame at which the next begins.
    """
    rate = windows.frames_per_second
    frames = features.shape[1]
    before = list(task.initial_prompt)
    count = 0
    language = task.language
    spoken = 0.0  # where the last speech ended, by its words
    for start, end in task.clips:
        seek, last = round(start * rate), min(frames, round(end * rate)) if end < math.inf else frames
        while seek < last:
            size = min(task.window, last - seek)
            states = windows.encode(features[:, seek : seek + size])
            if task.multilingual:
                language = next(iter(windows.likely([states])[0]))
            prefix = task.prefix if seek == 0 else None
            prompt = windows.prompt(
                *(language, task.task, task.target, before, task.hotwords, prefix),
                without_timestamps=task.choice.without_timestamps,
            )
            (heard,) = windows.hear([states], [prompt], task.choice, seed=seek, frames=[size])
            if is_silence(heard, task.choice):
                seek += size
                on_window(heard, seek)
                continue
            offset, seconds = seek / rate, size / rate
            segments, forward = segments_of(windows, heard, seek, offset, seconds)
            if not heard.whole and forward == seconds:
                warn_cut(segments, offset, seconds)
            if heard.timing is not None:
                _give_words(windows, segments, heard, offset, language, task, spoken)
                said = ended(segments, 0.0)
                if said > offset and not ends_once(heard.tokens, windows.begin):
                    forward = said - offset  # What the last word of a whole segment ends is heard.
                if (threshold := task.hallucination_silence_threshold) is not None:
                    edges = (offset, offset + seconds, offset + windows.frames / rate)
                    if (doubted := doubt(segments, spoken, edges, last / rate, threshold)) is not None:
                        stand, again = doubted
                        del segments[stand:]
                        forward = again - offset
                spoken = ended(segments, spoken)
            seek += max(1, round(forward * rate))
            for segment in audible(segments):
                before += segment.tokens
                count += 1
                segment.id = count
                yield segment
            on_window(heard, seek)
            if not task.condition_on_previous_text or heard.temperature > task.prompt_reset_on_temperature:
                before = []


def transcribe_batch(
    windows: Windows, parts: Sequence[tuple[float, float, Tensor]], batch_size: int, task: Task
) -> Iterator[Segment]:
    """The segments of clips that fit a window, several decoded together, none knowing of the others.

    Args:
        parts: of each clip its start and length in seconds, and its features [mel bins, frames].
    """
    rate = windows.frames_per_second
    count = 0
    said = 0.0  # where the last speech ended, by its words
    for first in range(0, len(parts), batch_size):
        rows = parts[first : first + batch_size]
        states = [windows.encode(features) for *_, features in rows]
        size = min(batch_size, len(parts))
        spoken = [task.language] * len(rows)
        if task.multilingual:
            spoken = [next(iter(likely)) for likely in windows.likely(states, size)]
        prompts = [
            windows.prompt(
                *(language, task.task, task.target, task.initial_prompt, task.hotwords, None),
                without_timestamps=task.choice.without_timestamps,
            )
            for language in spoken
        ]
        found = windows.hear(
            *(states, prompts, task.choice),
            seed=first,
            rows=size,
            frames=[features.shape[1] for *_, features in rows],
        )
        for (offset, seconds, _), language, heard in zip(rows, spoken, found, strict=True):
            segments, forward = segments_of(windows, heard, round(offset * rate), offset, seconds, rest=True)
            if not heard.whole and forward == seconds:
                warn_cut(segments, offset, seconds)
            if heard.timing is not None:
                _give_words(windows, segments, heard, offset, language, task, said)
                said = ended(segments, said)
            for segment in audible(segments):
                count += 1
                segment.id = count
                yield segment


def segments_of(
    windows: Windows, heard: Heard, seek: int, offset: float, seconds: float, rest: bool = False
) -> tuple[list[Segment], float]:
    """The segments of a window that begins at `offset` seconds, ids left open, and the seconds that they
    account for. `rest`: whether what the window's end cut off is a segment too."""
    pieces, forward = split(heard.tokens, windows.begin, seconds)
    done = sum(len(piece.tokens) for piece in pieces)
    if rest and done < len(heard.tokens):
        pieces.append(Piece(forward, seconds, heard.tokens[done:]))
        forward = seconds
    found = []
    for start, end, tokens in pieces:
        segment = Segment(
            id=0,
            seek=seek,
            start=round(offset + start, 3),
            end=round(offset + end, 3),
            text=windows.text(tokens),
            tokens=tokens,
            avg_logprob=heard.avg_logprob,
            compression_ratio=heard.compression_ratio,
            no_speech_prob=heard.no_speech_prob,
            words=None,
            temperature=heard.temperature,
        )
        found.append(segment)
    return found, forward


def audible(segments: Sequence[Segment]) -> list[Segment]:
    """Those that have a text and last."""
    return [segment for segment in segments if segment.start < segment.end and segment.text.strip()]


def _give_words(
    windows: Windows,
    segments: Sequence[Segment],
    heard: Heard,
    offset: float,
    language: str,
    task: Task,
    spoken: float,
) -> None:
    """Give a window's segments their words; the speech before them ended at `spoken`."""
    assert heard.timing is not None
    parts = [windows.text_tokens(segment.tokens) for segment in segments]
    written = task.target or language
    found, usual = words(windows.tokenizer, parts, heard.timing, written, task.punctuation)
    for word in itertools.chain(*found):
        word.start, word.end = word.start + offset, word.end + offset
    give(segments, found, usual, spoken)


def warn_cut(segments: Sequence[Segment], offset: float, seconds: float) -> None:
    """What a limit of tokens left unheard is not passed over in silence."""
    tokens = sum(len(segment.tokens) for segment in segments)
    warnings.warn(
        f"the text of {offset:.2f} to {offset + seconds:.2f} seconds is cut short after {tokens} tokens",
        stacklevel=3,
    )
