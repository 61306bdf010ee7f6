"""Processor and feature extractor: Whisper's, which also take source text, and never cut audio unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, WhisperFeatureExtractor, WhisperProcessor

Audio = np.ndarray | Sequence[float] | Sequence[np.ndarray]


class WhisperM2MFeatureExtractor(WhisperFeatureExtractor):
    """Log-mel features; audio longer than the model's window is refused, where Whisper's own cuts it."""

    def __call__(self, raw_speech: Audio, truncation: bool = False, **kwargs: Any) -> BatchFeature:
        """As Whisper's. Raises ValueError for audio longer than the window, unless `truncation` is True, or
        `padding` "longest", which asks for features of any length."""
        if not truncation and kwargs.get("padding") != "longest":
            check_window(self, raw_speech)
        return super().__call__(raw_speech, truncation=truncation, **kwargs)


def check_window(extractor: WhisperFeatureExtractor, audio: Audio) -> None:
    """Raises ValueError where a clip, mono samples alone or one of several, is longer than the window."""
    clips = audio if len(audio) and np.ndim(audio[0]) else [audio]
    longest, limit = max(map(len, clips)), extractor.n_samples
    if longest > limit:
        raise ValueError(
            f"audio must be at most {limit / extractor.sampling_rate:g} seconds long, the model's window, "
            f"got {longest / extractor.sampling_rate:.1f}; a pipeline cuts it with chunk_length_s, "
            "and kvspn.speech.translator translates any length"
        )


class WhisperM2MProcessor(WhisperProcessor):
    """Speech to log-mel features, source text to token ids, token ids to text."""

    def __call__(
        self,
        audio: np.ndarray | Sequence[np.ndarray] | None = None,
        *args: Any,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            audio: mono samples in [-1, 1] at `sampling_rate`, one clip or several; gives `input_features`
                [B, mel bins, frames], padded to the model's window.
            text: source text instead; gives `input_ids` and `attention_mask` [B, T] without Whisper's
                prompt, for the text encoder.

        Raises ValueError where both or neither are given, a text is empty, or audio is longer than the window
        (unless `truncation` is True, which cuts it).
        """
        if (audio is None) == (text is None):
            raise ValueError("give either audio or text")
        if audio is not None:
            if not kwargs.get("truncation"):
                check_window(self.feature_extractor, audio)
            return self.feature_extractor(
                audio, *args, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs
            )
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(each.strip() for each in texts):
            raise ValueError(f"text must not be empty, got {text!r}")
        eos = self.tokenizer.eos_token
        encoded = self.tokenizer(
            [each + eos for each in texts],
            add_special_tokens=False,
            padding=True,
            return_tensors=return_tensors,
        )
        return BatchFeature(dict(encoded))
