"""Speech of any length to text in another language: a model, its processor and one engine for every chunk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvspn.assets import bundled_model
from kvspn.decoding import DecodeStats
from kvspn.engines import default_backend
from kvspn.models import WhisperM2MForConditionalGeneration, WhisperM2MProcessor
from kvspn.models.folder import ModelError, open_model
from kvspn.models.prompts import check_target, text_before
from kvspn.models.settings import code
from kvspn.speech.audio import SAMPLING_RATE, split_audio
from kvspn.speech.segments import Segment
from kvspn.speech.transcription import Task, transcribe
from kvspn.speech.windows import Choice, Heard, Windows

UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
"""Languages written without spaces between words."""


@dataclass(frozen=True)
class Translation:
    """One clip's translation.

    sources: the language spoken in each chunk; target: the text's, where it is the same a transcription's.
    probabilities: of each chunk every language's, the likeliest first; empty unless asked for. segments: of
    a model with timestamps.
    tokens: the generated ones, chunk after chunk, with the end tokens. chunks: figures of each chunk; total:
    those of all together.
    """

    text: str
    sources: list[str]
    target: str
    tokens: list[int]
    chunks: list[DecodeStats]
    total: DecodeStats
    probabilities: list[dict[str, float]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The language spoken in most chunks, of several the first."""
        return max(self.sources, key=self.sources.count)


class Translator:
    """Translates clip after clip on the same engine.

    With a model that has timestamps it moves through a recording as Whisper does (`transcription.py`); for
    one without, the miniature, it cuts what is longer than a window at pauses.

    Raises:
        ModelError: a model whose languages are not known, or whose window the preprocessor does not fit.
    """

    def __init__(
        self,
        model: WhisperM2MForConditionalGeneration,
        processor: WhisperM2MProcessor,
        backend: str | None = None,
        weights: str | None = None,
        kv: str | None = None,
        encoder_format: str | None = None,
    ) -> None:
        """`backend`: a name from `kvspn.engines.backends`; None is the fastest that is here. `weights`: their
        format in the decoder (see `kvspn.weights.formats.quantise`); None leaves them as they are.
        `kv`: "int8" for int8 caches; None for those of the embeddings' dtype. `encoder_format`: "fp32",
        "bf16" or "int8" for the speech encoder of the C++ library, on the CPU (see `model.speech_encoder`);
        None for torch's."""
        self.model = model
        self.processor = processor
        said = model.generation_config
        english_only = getattr(said, "is_multilingual", True) is False
        tokens = {} if english_only else getattr(said, "lang_to_id", None) or {}
        self.languages = ["en"] if english_only else sorted(map(code, tokens))
        self._language_codes = {token: code(name) for name, token in tokens.items()}
        self.window = processor.feature_extractor.n_samples
        positions = model.config.max_source_positions
        if not self.languages:
            raise ModelError("the model's generation configuration names no languages (lang_to_id)")
        if processor.feature_extractor.nb_max_frames != 2 * positions:
            frames = processor.feature_extractor.nb_max_frames
            raise ModelError(f"the preprocessor makes {frames} frames, the model takes {2 * positions}")
        self.backend = backend or default_backend(model.device)
        self.weights = weights
        self.kv = kv
        self.windows = Windows(model, processor, encoder_format, backend=self.backend, weights=weights, kv=kv)
        self.engine = self.windows.engine(1)

    @classmethod
    def from_folder(
        cls,
        folder: str | PathLike[str] | None = None,
        backend: str | None = None,
        weights: str | None = None,
        kv: str | None = None,
        draft: str | PathLike[str] | None = None,
        encoder_format: str | None = None,
    ) -> Translator:
        """Opens a whisperM2M or any Whisper (see `kvspn.models.folder.open_model`), float32 on the CPU.

        Args:
            folder: or a .pt file, a model hub's id, an installed package's name; None for the miniature.
            draft: the folder of a draft network trained for it; None is its own, if it has one.

        Raises:
            ModelError: naming it and the part that is missing or wrong.
        """
        path = bundled_model() if folder is None else os.fspath(folder)
        parts = open_model(path, torch.float32, None if draft is None else os.fspath(draft))
        try:
            return cls(*parts, backend, weights, kv, encoder_format)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error

    def check_language(self, language: str) -> str:
        """The code of a language ("de", "German"). Raises ValueError for one that the model does not know."""
        if code(language) not in self.languages:
            raise ValueError(f"unknown language {language!r}: this model knows {', '.join(self.languages)}")
        return code(language)

    def check_languages(self, target: str | None, source: str | None) -> tuple[str | None, str | None]:
        """Their codes. Raises ValueError for an unknown one, or a target that was never taught."""
        target, source = (each if each is None else self.check_language(each) for each in (target, source))
        if target is not None and source is not None:
            check_target(target, source, self.model.config.target_languages)
        return target, source

    def translate(
        self,
        samples: np.ndarray,
        target: str | None = None,
        source: str | None = None,
        *,
        task: str | None = None,
        prompt: str | None = None,
        hotwords: str | None = None,
        prefix: str | None = None,
        probabilities: bool = False,
        word_timestamps: bool = False,
        k: int | float | str = 1,
        draft: bool = True,
        on_text: Callable[[str], object] = lambda text: None,
        on_chunk: Callable[[int, int], object] = lambda done, total: None,
    ) -> Translation:
        """Translates one clip, or transcribes it where `target` is its language or None.

        Args:
            samples: float32 [N], mono at 16 kHz (see `kvspn.speech.audio.load_audio`), of any length.
            target: the language to translate to, its code or name. A Whisper knows English alone.
            source: the language spoken; None detects it, without timestamps in each chunk.
            task: "transcribe", or "translate", to English where there is no target.
            prompt: text that went before: topic, spelling, style. Without timestamps it is told every chunk.
            hotwords: words to expect, likewise; without effect beside a prefix.
            prefix: how the text of the first chunk begins; it is not repeated in the text.
            probabilities: whether to say how likely each language was, where it is detected.
            word_timestamps: whether segments have words with times, of a model with timestamps.
            k: a draft is accepted if among the base model's k likeliest tokens; "inf" accepts all.
            draft: False for plain greedy decoding, as always where no draft network has been trained.
            on_text: called with each new piece of text; the pieces together are the whole text.
            on_chunk: called with the number of chunks, with timestamps of seconds, that are done, and their
                total.

        Raises:
            ValueError: an unknown language or one that the model was never taught to translate to, a bad k,
                samples that are not finite or only silence.
        """
        if target is None and task == "translate":
            target = "en"
        target, source = self.check_languages(target, source)
        if not np.isfinite(samples).all():
            raise ValueError("samples must be finite, got NaN or infinity")
        chunks = split_audio(samples, self.window)
        if not chunks:
            raise ValueError("samples must hold speech, got only silence")
        if self.windows.has_timestamps:
            choice = Choice(k=k, draft=draft, word_timestamps=word_timestamps)
            return self._segments(
                *(samples, target, source, task, prompt, hotwords, prefix, choice, on_text, on_chunk)
            )
        if word_timestamps:
            raise ValueError("word_timestamps must be False for a model without timestamps, got True")
        pieces: list[str] = []
        sources: list[str] = []
        tokens: list[int] = []
        stats: list[DecodeStats] = []
        likely: list[dict[str, float]] = []
        positions = self.model.config.max_target_positions

        def emit(text: str) -> None:
            pieces.append(text)
            on_text(text)

        def separator(prompt: list[int]) -> str:
            """Before a chunk's text: nothing, or a space where the language written has them."""
            known = self._language_codes
            written = target or next((known[token] for token in prompt if token in known), "en")
            return "" if not pieces or written in UNSPACED else " "

        for done, chunk in enumerate(chunks, 1):
            first = prefix if done == 1 else None
            prompt_ids, prefix_ids = text_before(self.processor.tokenizer, positions, prompt, hotwords, first)
            features = self.processor(chunk, sampling_rate=SAMPLING_RATE).input_features[0]
            output: Any = self.model.generate(
                encoder_outputs=([self.windows.encode(features)],),
                language=source,
                target_language=target,
                task=task,
                prompt_ids=prompt_ids,
                prefix_ids=prefix_ids,
                language_probabilities=probabilities,
                k=k,
                draft=None if draft else False,
                streamer=_TextStream(self.decode, emit, separator),
                return_dict_in_generate=True,
                engine=self.engine,
            )
            sources += output.languages
            tokens += output.sequences[0].tolist()
            stats += output.stats
            likely += output.language_probabilities or []
            on_chunk(done, len(chunks))
        total = DecodeStats.total(stats, sum(each.seconds for each in stats))
        written = target or max(sources, key=sources.count)
        return Translation("".join(pieces), sources, written, tokens, stats, total, likely)

    def _segments(
        self,
        samples: np.ndarray,
        target: str | None,
        source: str | None,
        task: str | None,
        prompt: str | None,
        hotwords: str | None,
        prefix: str | None,
        choice: Choice,
        on_text: Callable[[str], object],
        on_chunk: Callable[[int, int], object],
    ) -> Translation:
        """The whole by timestamps, its language detected once."""
        windows = self.windows
        features = windows.features(samples)
        likely: list[dict[str, float]] = []
        if source is None:
            likely += windows.likely([windows.encode(features[:, : windows.frames], keep=True)])
            source = next(iter(likely[0]))
        heard: list[Heard] = []
        seconds = -(-len(samples) // SAMPLING_RATE)

        def count(window: Heard, seek: int) -> None:
            heard.append(window)
            on_chunk(min(seconds, seek // windows.frames_per_second), seconds)

        wanted = Task(
            source,
            task or ("translate" if target not in (None, source) else "transcribe"),
            target,
            windows.ids(prompt) if prompt and prompt.strip() else [],
            choice,
            windows.frames,
            prefix=prefix,
            hotwords=hotwords,
        )
        segments: list[Segment] = []
        for segment in transcribe(windows, features, wanted, count):
            on_text(segment.text if segments else segment.text.lstrip())
            segments.append(segment)
        end = [self.model.config.eos_token_id]
        stats = [window.stats for window in heard]
        return Translation(
            "".join(segment.text for segment in segments).strip(),
            [source] * len(heard),
            target or source,
            [token for window in heard for token in [*window.tokens, *end * window.whole]],
            stats,
            DecodeStats.total(stats, sum(each.seconds for each in stats)),
            likely,
            segments,
        )

    def decode(self, tokens: list[int]) -> str:
        """The text of generated tokens; special ones are left out."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


class _TextStream(BaseStreamer):
    """Passes on the text of the tokens that it is given, as soon as its characters are complete.

    White space at both ends is dropped; `separator`, given the prompt, says what goes before the first piece.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        emit: Callable[[str], None],
        separator: Callable[[list[int]], str],
    ) -> None:
        self._decode = decode
        self._emit = emit
        self._separator = separator
        self._prompt: list[int] = []
        self._tokens: list[int] = []
        self._sent = 0  # characters

    def put(self, value: Tensor) -> None:
        """value: new token ids [T]; the prompt, which is no text of its own, comes first as [1, T]."""
        if value.dim() > 1:
            self._prompt = value.flatten().tolist()
            return
        self._tokens += value.tolist()
        # A character's first bytes alone decode to replacement characters.
        self._send(self._decode(self._tokens).strip().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        self._send(self._decode(self._tokens).strip())

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._emit(("" if self._sent else self._separator(self._prompt)) + text[self._sent :])
            self._sent = len(text)
