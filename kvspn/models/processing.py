"""Processor: Whisper's, which also takes source text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, WhisperProcessor


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
                [B, mel bins, frames], padded or cut to the model's window.
            text: source text instead; gives `input_ids` and `attention_mask` [B, T] without Whisper's
                prompt, for the text encoder.

        Raises ValueError where both or neither are given, or a text is empty.
        """
        if (audio is None) == (text is None):
            raise ValueError("give either audio or text")
        if audio is not None:
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
