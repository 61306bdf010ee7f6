"""Batches for training: clips or source text in, target tokens out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import WhisperTokenizer

from kvspn.training.corpus import LANGUAGES, Sentence
from kvspn.training.store import FeatureStore, pad_features

IGNORE = -100


class ClipDataset(Dataset):
    """Clips by number; the collator reads what it needs of them."""

    def __init__(self, store: FeatureStore):
        self.frames = np.diff(store.offsets).tolist()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, clip: int) -> dict[str, Any]:
        """`input_ids` is only there for its length, by which Trainer groups the batches."""
        return {"clip": clip, "input_ids": range(self.frames[clip])}


def prompt_tokens(source: str, target: str) -> list[str]:
    """The decoder's prompt: Whisper's own to transcribe; to translate, the target language follows the task.

    <|startoftranscript|> <|source|> <|transcribe|> <|notimestamps|>
    <|startoftranscript|> <|source|> <|translate|> <|target|> <|notimestamps|>
    """
    task = ["<|transcribe|>"] if source == target else ["<|translate|>", f"<|{target}|>"]
    return ["<|startoftranscript|>", f"<|{source}|>", *task, "<|notimestamps|>"]


@dataclass
class Collator:
    """Clips -> speech features, source text, decoder input and labels.

    Every clip is decoded into `targets` of the languages, drawn anew each time; its own, a transcription, may
    be among them. With 0 it is only transcribed. A fifth of the batches is padded to the full window, as in
    use; the others to a little over their longest clip.
    """

    store: FeatureStore
    sentences: Sequence[Sentence]
    tokenizer: WhisperTokenizer
    alphabet: Mapping[str, int]  # CTC's classes
    window: int  # frames
    targets: int
    rng: random.Random

    def __post_init__(self) -> None:
        self._text_ids: dict[tuple[int, str], list[int]] = {}

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Returns: of each clip input_features float32 [B, mel bins, frames], feature_lengths [B] (frames
        without padding), input_ids and attention_mask [B, T] (source text), characters [B, C] (the same by
        characters); and of each clip's targets in turn decoder_input_ids and labels [B * targets, T'], the
        prompt's labels ignored but for the source language, which Whisper predicts.
        """
        clips = [item["clip"] for item in items]
        features = [self.store.features(clip) for clip in clips]
        longest = max(map(len, features))
        full = self.rng.random() < 0.2
        frames = self.window if full else min(self.window, longest + self.rng.randrange(0, 40))
        sources, characters, inputs, labels = [], [], [], []
        for clip in clips:
            source = self.store.languages[clip]
            sentence = self.store.sentences[clip]
            text = self.sentences[sentence].texts[source]
            sources.append([*self.text_ids(sentence, source), self.tokenizer.eos_token_id])
            characters.append([self.alphabet[char] for char in text if char in self.alphabet])
            for target in self.rng.sample(LANGUAGES, self.targets) or [source]:
                prompt = self.tokenizer.convert_tokens_to_ids(prompt_tokens(source, target))
                tokens = [*prompt, *self.text_ids(sentence, target), self.tokenizer.eos_token_id]
                inputs.append(tokens[:-1])
                ignored = [IGNORE] * (len(prompt) - 2)
                labels.append([prompt[1], *ignored, *tokens[len(prompt) :]])
        return {
            "input_features": torch.from_numpy(pad_features(features, frames)),
            "feature_lengths": torch.tensor([len(each) for each in features]),
            "input_ids": pad(sources, self.tokenizer.eos_token_id),
            "attention_mask": pad([[1] * len(each) for each in sources], 0),
            "characters": pad(characters, IGNORE),
            "decoder_input_ids": pad(inputs, self.tokenizer.eos_token_id),
            "labels": pad(labels, IGNORE),
        }

    def text_ids(self, sentence: int, language: str) -> list[int]:
        """Tokens of one sentence, without special ones."""
        key = (sentence, language)
        if key not in self._text_ids:
            text = self.sentences[sentence].texts[language]
            self._text_ids[key] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._text_ids[key]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [B, longest], filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def alphabet(sentences: Iterable[Sentence]) -> dict[str, int]:
    """A class for every character that occurs; 0 is left for CTC's blank."""
    letters = {char for sentence in sentences for text in sentence.texts.values() for char in text}
    return {char: 1 + i for i, char in enumerate(sorted(letters))}
