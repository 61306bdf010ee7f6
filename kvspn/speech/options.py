"""What a caller of `kvspn.WhisperModel` asks for: each argument checked, honoured or refused by its name."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvspn.checks import boolean, integer
from kvspn.speech.audio import SAMPLING_RATE
from kvspn.speech.vad import VadOptions

# What no engine does yet, and the one value that asks for nothing.
_NOT_HONOURED: Mapping[str, object] = {
    "beam_size": 1,
    "patience": 1,
    "length_penalty": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
}


@dataclass
class TranscriptionOptions:
    """What a transcription was asked for; the fields are those of faster-whisper."""

    beam_size: int
    best_of: int
    patience: float
    length_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    log_prob_threshold: float | None
    no_speech_threshold: float | None
    compression_ratio_threshold: float | None
    condition_on_previous_text: bool
    prompt_reset_on_temperature: float
    temperatures: list[float]
    initial_prompt: str | Iterable[int] | None
    prefix: str | None
    suppress_blank: bool
    suppress_tokens: Sequence[int] | None
    without_timestamps: bool
    max_initial_timestamp: float
    word_timestamps: bool
    prepend_punctuations: str
    append_punctuations: str
    multilingual: bool
    max_new_tokens: int | None
    clip_timestamps: Any
    hallucination_silence_threshold: float | None
    hotwords: str | None


def read_options(arguments: Mapping[str, Any]) -> TranscriptionOptions:
    """The arguments of `WhisperModel.transcribe`, by their names, checked each by itself."""
    for name, neutral in _NOT_HONOURED.items():
        if arguments[name] != neutral:
            raise ValueError(
                f"{name} must be {neutral!r}, since no engine honours it yet, got {arguments[name]!r}"
            )
    temperature = arguments["temperature"]
    temperatures = list(temperature) if isinstance(temperature, (list, tuple)) else [temperature]
    if not temperatures:
        raise ValueError("temperature must be a number from 0, or several, got none")
    for name, values in (
        ("temperature", temperatures),
        ("max_initial_timestamp", [arguments["max_initial_timestamp"]]),
        ("prompt_reset_on_temperature", [arguments["prompt_reset_on_temperature"]]),
    ):
        for value in values:
            check_number(name, value, 0, sys.float_info.max)
    for name in ("compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"):
        if arguments[name] is not None:
            check_number(name, arguments[name], -math.inf, math.inf)
    for name in (
        *("log_progress", "condition_on_previous_text", "suppress_blank", "without_timestamps"),
        *("multilingual", "word_timestamps"),
    ):
        boolean(name, arguments[name])
    for name in ("prefix", "hotwords"):
        if not isinstance(arguments[name], str | None):
            raise TypeError(f"{name} must be a string or None, got {type(arguments[name]).__name__}")
    for name in ("prepend_punctuations", "append_punctuations"):
        if not isinstance(arguments[name], str):
            raise TypeError(f"{name} must be a string, got {type(arguments[name]).__name__}")
    if (threshold := arguments["hallucination_silence_threshold"]) is not None:
        check_number("hallucination_silence_threshold", threshold, 0, math.inf)
        if not arguments["word_timestamps"]:
            raise ValueError(
                "word_timestamps must be True with hallucination_silence_threshold, which looks at words, "
                "got False"
            )
    integer("best_of", arguments["best_of"], 1, 1000)
    if arguments["max_new_tokens"] is not None:
        integer("max_new_tokens", arguments["max_new_tokens"], 1, 100_000)
    names = {field.name for field in dataclasses.fields(TranscriptionOptions)} - {"temperatures"}
    return TranscriptionOptions(
        **{name: arguments[name] for name in names}, temperatures=[float(each) for each in temperatures]
    )


def read_samples(name: str, samples: np.ndarray) -> np.ndarray:
    """float32 [N] from floats, mono at 16 kHz."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
        got = (
            f"{samples.dtype} {list(samples.shape)}"
            if isinstance(samples, np.ndarray)
            else type(samples).__name__
        )
        raise ValueError(f"{name} must be float samples of one dimension, mono at 16 kHz, got {got}")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return np.ascontiguousarray(samples, np.float32)


def read_clips(given: str | Sequence[float]) -> list[tuple[float, float]]:
    """ "0,3.5,10" -> [(0, 3.5), (10, inf)]."""
    try:
        points = [float(each) for each in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        points = [math.nan]
    points = points or [0.0]
    if any(not 0 <= point < math.inf for point in points) or points != sorted(points):
        raise ValueError(
            f"clip_timestamps must be seconds in ascending order, as 'start,end,start,...', got {given!r}"
        )
    if len(points) % 2:
        points.append(math.inf)
    return list(zip(points[::2], points[1::2], strict=True))


def read_batch_clips(
    given: Sequence[Mapping[str, float]], window: float, total: int
) -> list[tuple[int, int]]:
    """[{"start": 0, "end": 3.5}] -> samples from and to."""
    clips = []
    for clip in given:
        if not isinstance(clip, Mapping) or clip.keys() != {"start", "end"}:
            raise ValueError(f"clip_timestamps must be dicts of start and end in seconds, got {clip!r}")
        start, end = clip["start"], clip["end"]
        if not 0 <= start < end <= start + window:
            raise ValueError(
                f"clip_timestamps must have a start before its end, {window:g} seconds apart at most, "
                f"got {clip!r}"
            )
        if start * SAMPLING_RATE >= total:
            raise ValueError(
                f"clip_timestamps must start within the {total / SAMPLING_RATE:.1f} seconds of audio, "
                f"got {clip!r}"
            )
        clips.append((round(start * SAMPLING_RATE), min(total, round(end * SAMPLING_RATE))))
    return clips


def read_vad_options(given: VadOptions | Mapping[str, Any] | None, fixed: Mapping[str, Any]) -> VadOptions:
    """fixed: fields that are not to be given."""
    known = {field.name for field in dataclasses.fields(VadOptions)}
    said = vars(given) if isinstance(given, VadOptions) else dict(given or {})
    if unknown := said.keys() - known:
        raise ValueError(f"vad_parameters must be of {', '.join(sorted(known))}, got {min(unknown)!r}")
    for name in fixed.keys() & said.keys():
        if said[name] != getattr(VadOptions(), name):
            raise ValueError(f"vad_parameters must leave out {name}: chunk_length says it")
    for name, value in said.items():
        if (name, value) != ("neg_threshold", None):
            check_number(f"vad_parameters[{name!r}]", value, 0, math.inf)
    return VadOptions(**{**said, **fixed})


def check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}")
