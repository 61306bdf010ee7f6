"""Hugging Face transformers: Whisper's own generate, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ("fp32",)


class Greedy:
    """A Recogniser, which also says how close a choice was."""

    def __init__(self, whisper: Any, processor: Any, task: str) -> None:
        self._whisper = whisper
        self._processor = processor
        self._task = task
        self._multilingual = getattr(whisper.generation_config, "is_multilingual", True) is not False

    @torch.no_grad()
    def __call__(self, samples: np.ndarray, language: str) -> list[int]:
        said = {"language": language, "task": self._task} if self._multilingual else {}
        found = self._whisper.generate(
            self._features(samples), num_beams=1, do_sample=False, return_timestamps=False, **said
        )
        end = self._whisper.config.eos_token_id  # text lies before it in the vocabulary, all else behind
        return [token for token in found[0].tolist() if token < end]

    @torch.no_grad()
    def margins(
        self, samples: np.ndarray, language: str, own: list[int], others: Sequence[list[int]]
    ) -> list[float]:
        """By how much the logit of its own token exceeds that of each other's, where the texts part."""
        end = self._whisper.config.eos_token_id
        said = self._whisper.generation_config
        start = [self._whisper.config.decoder_start_token_id]
        if self._multilingual:
            start += [said.lang_to_id[f"<|{language}|>"], said.task_to_id[self._task]]
        states = self._whisper.model.encoder(self._features(samples))
        found = []
        for other in others:
            both = list(zip([*own, end], [*other, end], strict=False))
            at = next(i for i, (mine, theirs) in enumerate(both) if mine != theirs)
            ids = torch.tensor([[*start, said.no_timestamps_token_id, *own[:at]]])
            logits: Tensor = self._whisper(encoder_outputs=states, decoder_input_ids=ids).logits[0, -1]
            mine, theirs = both[at]
            found.append(float(logits[mine] - logits[theirs]))
        return found

    def _features(self, samples: np.ndarray) -> Tensor:
        features: Tensor = self._processor(samples, sampling_rate=16_000, return_tensors="pt").input_features
        return features


def prepare(whisper: Any, processor: Any, fmt: str, task: str) -> Greedy:
    return Greedy(whisper, processor, task)
