"""`kvspn.WhisperModel`: transcription by faster-whisper's interface, so that a user changes one import."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvspn.checks import boolean, integer
from kvspn.engines import backends
from kvspn.models import prompts
from kvspn.models.checkpoints.packages import PACKAGED, files
from kvspn.models.folder import open_model
from kvspn.models.settings import code
from kvspn.speech.audio import SAMPLING_RATE, load_audio
from kvspn.speech.options import (
    TranscriptionOptions,
    check_number,
    read_batch_clips,
    read_clips,
    read_options,
    read_samples,
    read_vad_options,
)
from kvspn.speech.segments import Segment, Word
from kvspn.speech.transcription import Task, transcribe, transcribe_batch
from kvspn.speech.vad import Joined, VadOptions, open_silero, speech
from kvspn.speech.windows import Choice, Windows
from kvspn.speech.words import Punctuation

__all__ = [
    "BatchedInferencePipeline",
    "Segment",
    "TranscriptionInfo",
    "TranscriptionOptions",
    "VadOptions",
    "WhisperModel",
    "Word",
]

Audio = str | os.PathLike[str] | BinaryIO | np.ndarray

# CTranslate2's types that are here what they are there: how the decoder's matrices are stored. Activations
# are fp32 beside every one.
_COMPUTE_TYPES = {
    "default": None,
    "auto": "int8",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "int8_bfloat16": "int8",
}

_SIZES = {
    **{
        size: f"openai/whisper-{size}"
        for name in ("tiny", "base", "small", "medium")
        for size in (name, f"{name}.en")
    },
    **{size: f"openai/whisper-{size}" for size in ("large-v1", "large-v2", "large-v3", "large-v3-turbo")},
    "large": "openai/whisper-large-v3",
    "turbo": "openai/whisper-large-v3-turbo",
    **{
        f"distil-{size}": f"distil-whisper/distil-{size}"
        for size in ("small.en", "medium.en", "large-v2", "large-v3", "large-v3.5")
    },
}

# What clips that are decoded beside each other do not do, and the values that ask for nothing.
_NOT_BATCHED: Mapping[str, tuple[object, ...]] = {
    "compression_ratio_threshold": (2.4, None),
    "log_prob_threshold": (-1.0, None),
    "no_speech_threshold": (0.6, None),
    "condition_on_previous_text": (True, False),
    "prompt_reset_on_temperature": (0.5,),
    "prefix": (None,),
    "hallucination_silence_threshold": (None,),
}


@dataclass
class TranscriptionInfo:
    """About a recording; the fields are those of faster-whisper, durations in seconds."""

    language: str
    language_probability: float
    duration: float
    duration_after_vad: float
    all_language_probs: list[tuple[str, float]] | None
    transcription_options: TranscriptionOptions
    vad_options: VadOptions | None


class WhisperModel:
    """A Whisper that transcribes recordings of any length.

    Threads may share it: each window of a recording waits for its turn on the one engine.
    """

    def __init__(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        device_index: int | list[int] = 0,
        compute_type: str = "default",
        cpu_threads: int = 0,
        num_workers: int = 1,
        download_root: str | None = None,
        local_files_only: bool = False,
        files: Mapping[str, Any] | None = None,
        revision: str | None = None,
        use_auth_token: str | bool | None = None,
        *,
        backend: str | None = None,
        encoder_format: str | None = None,
        draft: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Args:
            model_size_or_path: a size ("base", "large-v3", "turbo", "distil-large-v3"), which is an installed
                package's or OpenAI's on the model hub; or whatever `kvspn.models.folder.open_model` opens.
            device: "cpu", "cuda", or "auto": a GPU where a backend for it is here.
            device_index: of the GPU, one.
            compute_type: how the decoder's weights are stored: "float32", "float16", "bfloat16", "int8" (its
                embeddings and caches in bf16, or "int8_bfloat16"); "default" leaves them in fp32, "auto" is
                int8. The encoder stays in fp32: see encoder_format.
            cpu_threads: of torch and the engine; 0 leaves torch's number.
            num_workers, download_root, local_files_only, files, revision, use_auth_token: must be at their
                defaults.
            backend: a name from `kvspn.engines.backends`; None is the fastest on the device.
            encoder_format: "fp32", "bf16" or "int8" for the encoder of the C++ library, on the CPU; None for
                torch's, in fp32.
            draft: the folder of a draft network trained for this model (`kvspn train draft`): the same text
                in fewer steps. None is the model's own, if it has one.

        Raises:
            ValueError: naming the argument, for what is not honoured.
            kvspn.models.folder.ModelError: what is no model, a damaged one, or another model's draft network.
        """
        for name, value, neutral in (
            ("num_workers", num_workers, 1),
            ("download_root", download_root, None),
            ("local_files_only", local_files_only, False),
            ("files", files, None),
            ("revision", revision, None),
            ("use_auth_token", use_auth_token or None, None),
        ):
            if value != neutral:
                raise ValueError(f"{name} must be {neutral!r}, since nothing here honours it, got {value!r}")
        if compute_type not in _COMPUTE_TYPES:
            raise ValueError(f"compute_type must be one of {', '.join(_COMPUTE_TYPES)}, got {compute_type!r}")
        integer("cpu_threads", cpu_threads, 0, 1024)
        where = _device(device, device_index, backend)
        if cpu_threads:
            torch.set_num_threads(cpu_threads)
        model, processor = open_model(
            _name(model_size_or_path), torch.float32, None if draft is None else os.fspath(draft)
        )
        self.windows = Windows(
            model.to(where),
            processor,
            encoder_format,
            backend=backend,
            weights=_COMPUTE_TYPES[compute_type],
        )

    @property
    def supported_languages(self) -> list[str]:
        """Codes of the languages that the model knows."""
        return list(self.windows.languages) or ["en"]

    def transcribe(
        self,
        audio: Audio,
        language: str | None = None,
        task: str = "transcribe",
        log_progress: bool = False,
        beam_size: int = 1,
        best_of: int = 5,
        patience: float = 1,
        length_penalty: float = 1,
        repetition_penalty: float = 1,
        no_repeat_ngram_size: int = 0,
        temperature: float | Sequence[float] = Choice.temperatures,
        compression_ratio_threshold: float | None = 2.4,
        log_prob_threshold: float | None = -1.0,
        no_speech_threshold: float | None = 0.6,
        condition_on_previous_text: bool = True,
        prompt_reset_on_temperature: float = 0.5,
        initial_prompt: str | Iterable[int] | None = None,
        prefix: str | None = None,
        suppress_blank: bool = True,
        suppress_tokens: Sequence[int] | None = (-1,),
        without_timestamps: bool = False,
        max_initial_timestamp: float = 1.0,
        word_timestamps: bool = False,
        prepend_punctuations: str = Punctuation.before,
        append_punctuations: str = Punctuation.after,
        multilingual: bool = False,
        vad_filter: bool = False,
        vad_parameters: VadOptions | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        chunk_length: int | None = None,
        clip_timestamps: str | Sequence[float] = "0",
        hallucination_silence_threshold: float | None = None,
        hotwords: str | None = None,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        """Transcribes a recording; nothing is decoded before the first segment is asked for.

        Args:
            audio: a file, something open for reading bytes, or float samples [N], mono at 16 kHz.
            language: what is spoken, its code or name; None detects it at the start.
            task: "transcribe", or "translate" to English.
            log_progress: whether a bar on stderr tells how far it is.
            beam_size, patience, length_penalty, repetition_penalty, no_repeat_ngram_size: must be at their
                defaults, that of beam_size being 1 here: decoding is greedy.
            best_of: draws at a temperature above 0, of which the likeliest counts.
            temperature: one, or several that are tried in turn where a window's text fails a threshold. 0 is
                greedy; draws depend on the window and the attempt alone, so that a run repeats bit for bit.
            compression_ratio_threshold: above this the text repeats itself, and fails.
            log_prob_threshold: below this mean log-probability it fails.
            no_speech_threshold: above this probability, and below log_prob_threshold, a window is silence,
                which has no segments. None switches each of the three off.
            condition_on_previous_text: whether a window is told the text before it.
            prompt_reset_on_temperature: above this temperature a text is not told to the next window.
            initial_prompt: text, or tokens, that went before the recording.
            prefix: how the first window's text begins; it is not repeated in the text.
            suppress_blank: whether a window's text may not begin with a space or its end.
            suppress_tokens: that never come; -1 stands for annotations of what is no speech.
            without_timestamps: whether a window is one segment; so it must be for a model without timestamps.
            max_initial_timestamp: seconds into the window at which its text begins, at most.
            word_timestamps: whether segments have words with times, from the attention of the passes that
                decode the text.
            prepend_punctuations, append_punctuations: marks that belong to the word behind, and in front.
            multilingual: whether the language is detected in each window.
            vad_filter: whether only speech is listened to, found by Silero's detector (`kvspn[vad]`).
            vad_parameters: a VadOptions, or some of its fields.
            max_new_tokens: of a window; what it cuts off is warned of.
            chunk_length: seconds of a window, at most the model's.
            clip_timestamps: "start,end,start,...", seconds; the last end may be left out. Not with
                vad_filter.
            hallucination_silence_threshold: seconds of silence beside words that look invented, from which on
                they are left out and what follows is heard again; with word_timestamps.
            hotwords: words to expect, told to each window; without effect beside a prefix.
            language_detection_threshold, language_detection_segments: so many windows are asked, until the
                likeliest language is above the threshold; if none is, that of most of them counts.

        Returns: a generator of segments, and what is known of the recording.

        Raises:
            TypeError, ValueError: naming the argument, before anything is decoded.
            kvspn.speech.audio.AudioError: a file that is no audio, or silent.
        """
        options = read_options(locals())
        choice = self._choice(options)
        clips = read_clips(clip_timestamps)
        boolean("vad_filter", vad_filter)
        if vad_filter and clip_timestamps != "0":
            raise ValueError(f"vad_filter must be False with clip_timestamps, got {clip_timestamps!r}")
        vad = read_vad_options(vad_parameters, {})
        window = self._window(chunk_length)
        language = self._languages(language, task, multilingual)
        samples = _samples(audio)
        duration = len(samples) / SAMPLING_RATE
        joined = None
        if vad_filter:
            joined = Joined(_speech(samples, vad))
            samples = joined.samples(samples)
        features = self.windows.features(samples)
        first = round(clips[0][0] * self.windows.frames_per_second)
        language, probability, likely = self._language(
            language,
            features[:, first if first < features.shape[1] else 0 :],
            language_detection_threshold,
            language_detection_segments,
        )
        wanted = Task(
            language=language,
            task=task,
            target="en" if task == "translate" else None,
            initial_prompt=self._prompt(initial_prompt),
            prefix=prefix,
            hotwords=hotwords,
            condition_on_previous_text=condition_on_previous_text,
            prompt_reset_on_temperature=prompt_reset_on_temperature,
            multilingual=multilingual,
            clips=clips,
            window=window,
            choice=choice,
            punctuation=Punctuation(prepend_punctuations, append_punctuations),
            hallucination_silence_threshold=hallucination_silence_threshold,
        )
        segments = _restored(transcribe(self.windows, features, wanted), joined)
        if log_progress:
            segments = _told(segments, duration)
        after = len(samples) / SAMPLING_RATE
        info = TranscriptionInfo(
            language, probability, duration, after, likely, options, vad if vad_filter else None
        )
        return segments, info

    def detect_language(
        self,
        audio: np.ndarray,
        *,
        vad_filter: bool = False,
        vad_parameters: VadOptions | Mapping[str, Any] | None = None,
        language_detection_segments: int = 1,
        language_detection_threshold: float | None = 0.5,
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """The language of samples [N] at 16 kHz, its probability, and those of all (see `transcribe`)."""
        samples = _samples(audio)
        if vad_filter:
            samples = Joined(_speech(samples, read_vad_options(vad_parameters, {}))).samples(samples)
        most = language_detection_segments * self.windows.frames
        found = self._language(
            None,
            self.windows.features(samples)[:, :most],
            language_detection_threshold,
            language_detection_segments,
        )
        return found[0], found[1], found[2] or [("en", 1.0)]

    def _choice(self, options: TranscriptionOptions) -> Choice:
        if not options.without_timestamps and not self.windows.has_timestamps:
            raise ValueError(
                "without_timestamps must be True for this model, whose vocabulary has no timestamps, "
                "got False"
            )
        shared = {field.name for field in dataclasses.fields(Choice)} & vars(options).keys()
        return Choice(**{name: getattr(options, name) for name in shared})

    def _languages(self, language: str | None, task: str, multilingual: bool) -> str | None:
        """The code of a language that is given, everything checked."""
        known = self.windows.languages
        if task not in prompts.TASKS:
            raise ValueError(f"task must be one of {', '.join(prompts.TASKS)}, got {task!r}")
        if not known and (task != "transcribe" or multilingual):
            name, value = ("task", task) if task != "transcribe" else ("multilingual", multilingual)
            wanted = "transcribe" if name == "task" else False
            raise ValueError(f"{name} must be {wanted!r} for an English-only model, got {value!r}")
        given = prompts.languages("language", language, 1, known)
        return None if given is None else code(given[0])

    def _language(
        self, given: str | None, features: Tensor, threshold: float | None, segments: int, rows: int = 1
    ) -> tuple[str, float, list[tuple[str, float]] | None]:
        """A recording's language, its probability, and where it was detected those of all; `rows`: of the
        engine that is asked."""
        if given is not None or not self.windows.languages:
            return given or "en", 1.0, None
        integer("language_detection_segments", segments, 1, 10_000)
        if threshold is not None:
            check_number("language_detection_threshold", threshold, 0, 1)
        best: dict[str, list[float]] = {}
        width = self.windows.frames
        for i in range(segments):
            if i and i * width >= features.shape[1]:
                break
            states = self.windows.encode(features[:, i * width : (i + 1) * width], keep=True)
            likely = list(self.windows.likely([states], rows)[0].items())
            language, probability = likely[0]
            if threshold is None or probability > threshold:
                return language, probability, likely
            best.setdefault(language, []).append(probability)
        language = max(best, key=lambda each: len(best[each]))
        return language, max(best[language]), likely

    def _prompt(self, given: str | Iterable[int] | None) -> list[int]:
        if isinstance(given, str):
            return self.windows.ids(given) if given.strip() else []
        return list(given or ())

    def _window(self, chunk_length: int | None) -> int:
        """Frames of a window."""
        longest = self.windows.frames // self.windows.frames_per_second
        if chunk_length is None:
            return self.windows.frames
        integer("chunk_length", chunk_length, 1, longest)
        return chunk_length * self.windows.frames_per_second


class BatchedInferencePipeline:
    """Transcribes a recording's stretches of speech beside each other, a row of the engine each.

    Each row accepts its own drafts. No window knows the text of another, and each is decoded once.
    """

    def __init__(self, model: WhisperModel) -> None:
        self.model = model

    def transcribe(
        self,
        audio: Audio,
        language: str | None = None,
        task: str = "transcribe",
        *,
        batch_size: int = 8,
        vad_filter: bool = True,
        vad_parameters: VadOptions | Mapping[str, Any] | None = None,
        clip_timestamps: Sequence[Mapping[str, float]] | None = None,
        without_timestamps: bool = True,
        temperature: float | Sequence[float] = 0.0,
        chunk_length: int | None = None,
        multilingual: bool = False,
        initial_prompt: str | Iterable[int] | None = None,
        hotwords: str | None = None,
        log_progress: bool = False,
        language_detection_threshold: float | None = 0.5,
        language_detection_segments: int = 1,
        **options: Any,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        """As `WhisperModel.transcribe`; what differs:

        Args:
            batch_size: clips that are decoded together, at most.
            vad_filter: stretches of speech are joined to clips of at most a window. False takes a recording
                that fits one window as it is.
            vad_parameters: without `max_speech_duration_s`, which is the window.
            clip_timestamps: instead of that the clips, each with its "start" and "end" in seconds.
            without_timestamps: by default a clip is one segment.
            temperature: of several the first.
            options: other arguments of `WhisperModel.transcribe`. Thresholds, `prefix` and
                `condition_on_previous_text` have nothing to act on here and must be at their defaults.
        """
        model, windows = self.model, self.model.windows
        for name, neutral in _NOT_BATCHED.items():
            if name in options and options[name] not in neutral:
                raise ValueError(
                    f"{name} must be {neutral[0]!r} where clips are decoded in batches, got {options[name]!r}"
                )
        arguments = _arguments(
            **options,
            language=language,
            task=task,
            without_timestamps=without_timestamps,
            temperature=temperature,
            multilingual=multilingual,
            initial_prompt=initial_prompt,
            hotwords=hotwords,
            clip_timestamps=clip_timestamps,
            condition_on_previous_text=False,
        )
        chosen = read_options(arguments)
        chosen.temperatures = chosen.temperatures[:1]
        choice = model._choice(chosen)
        integer("batch_size", batch_size, 1, 4096)
        boolean("vad_filter", vad_filter)
        window = model._window(chunk_length) / windows.frames_per_second
        if vad_parameters is None:
            vad_parameters = {"min_silence_duration_ms": 160}
        vad = read_vad_options(vad_parameters, {"max_speech_duration_s": window})
        language = model._languages(language, task, multilingual)
        samples = _samples(audio)
        joined = None
        if clip_timestamps is not None:
            clips = read_batch_clips(clip_timestamps, window, len(samples))
            parts = [(start / SAMPLING_RATE, samples[start:end]) for start, end in clips]
        elif vad_filter:
            joined = Joined(_speech(samples, vad))
            parts = [
                (start / SAMPLING_RATE, joined.samples(samples)[start:end])
                for start, end in joined.groups(round(window * SAMPLING_RATE))
            ]
        elif len(samples) <= window * SAMPLING_RATE:
            parts = [(0.0, samples)]
        else:
            raise ValueError(
                f"vad_filter must be True, or clip_timestamps given, for more than {window:g} seconds, got "
                f"{len(samples) / SAMPLING_RATE:.1f}"
            )
        found = [(offset, len(part) / SAMPLING_RATE, windows.features(part)) for offset, part in parts]
        language, probability, likely = model._language(
            language,
            torch.cat([each for *_, each in found] or [windows.features(samples[:0])], dim=1),
            language_detection_threshold,
            language_detection_segments,
            max(1, min(batch_size, len(parts))),
        )
        wanted = Task(
            language=language,
            task=task,
            target="en" if task == "translate" else None,
            initial_prompt=model._prompt(initial_prompt),
            hotwords=hotwords,
            multilingual=multilingual,
            window=windows.frames,
            choice=choice,
            punctuation=Punctuation(chosen.prepend_punctuations, chosen.append_punctuations),
        )
        segments = _restored(transcribe_batch(windows, found, batch_size, wanted), joined)
        duration = len(samples) / SAMPLING_RATE
        if log_progress:
            segments = _told(segments, duration)
        after = sum(len(part) for _, part in parts) / SAMPLING_RATE
        used = vad if joined is not None else None
        return segments, TranscriptionInfo(language, probability, duration, after, likely, chosen, used)


def _name(given: str | os.PathLike[str]) -> str:
    """What `open_model` opens, of a size too."""
    name = os.fspath(given)
    if name not in _SIZES or os.path.exists(name):
        return name
    packaged = f"whisper-{name}"
    return packaged if packaged in PACKAGED and files(packaged) is not None else _SIZES[name]


def _device(device: str, index: int | list[int], backend: str | None) -> torch.device:
    if not isinstance(index, int) or not 0 <= index <= 255:
        raise ValueError(f"device_index must be the number of one GPU, got {index!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    here = torch.cuda.is_available()
    if device == "cuda" and not here:
        raise ValueError("device must be cpu or auto where PyTorch sees no GPU, got 'cuda'")
    if device == "auto":
        ready = backends()
        device = "cuda" if here and any(ready[name] is None for name in ("cuda", "triton")) else "cpu"
    return torch.device("cuda", index) if device == "cuda" else torch.device("cpu")


def _arguments(**given: Any) -> dict[str, Any]:
    """Those of `WhisperModel.transcribe`, defaults where they are not given."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(WhisperModel.transcribe).parameters.items()
        if parameter.default is not parameter.empty
    }
    if unknown := given.keys() - known.keys():
        raise TypeError(f"transcribe() has no argument {min(unknown)!r}")
    return known | given


def _samples(audio: Audio) -> np.ndarray:
    """float32 [N], mono at 16 kHz."""
    return read_samples("audio", audio) if isinstance(audio, np.ndarray) else load_audio(audio)


def _speech(samples: np.ndarray, options: VadOptions) -> list[tuple[int, int]]:
    return speech(open_silero()(torch.from_numpy(samples)).tolist(), len(samples), options)


def _restored(segments: Iterator[Segment], joined: Joined | None) -> Iterator[Segment]:
    """Segments at their times in the recording, of which only speech was listened to."""
    for segment in segments:
        if joined is not None and segment.words:
            for word in segment.words:  # Both ends are of the stretch that the word's middle is in.
                stretch = joined.stretch((word.start + word.end) / 2)
                word.start, word.end = (joined.time(each, stretch) for each in (word.start, word.end))
            segment.start, segment.end = segment.words[0].start, segment.words[-1].end
        elif joined is not None:
            segment.start = joined.time(segment.start)
            segment.end = joined.time(segment.end, joined.stretch(segment.end, end=True))
        yield segment


def _told(segments: Iterator[Segment], duration: float) -> Iterator[Segment]:
    """Segments, with a bar on stderr."""
    from tqdm import tqdm

    with tqdm(total=round(duration, 2), unit="seconds") as bar:
        for segment in segments:
            bar.update(round(max(0.0, segment.end - bar.n), 2))
            yield segment
