"""Batches for training: clips or source text in, target tokens out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import WhisperTokenizer

from kvspn.training.corpus import LANGUAGES, Sentence
from kvspn.training.outputs import Outputs
from kvspn.training.states import StateStore, padded_frames
from kvspn.training.store import FeatureStore, pad_features

IGNORE = -100


class ClipDataset(Dataset):
    """Clips by number; the collator reads what it needs of them."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, clip: int) -> dict[str, Any]:
        """`input_ids` is only there for its length, by which Trainer groups the batches."""
        return {"clip": clip, "input_ids": range(self.lengths[clip])}


def prompt_tokens(source: str, target: str) -> list[str]:
    """The decoder's prompt: Whisper's own to transcribe; to translate, the target language follows the task.

    <|startoftranscript|> <|source|> <|transcribe|> <|notimestamps|>
    <|startoftranscript|> <|source|> <|translate|> <|target|> <|notimestamps|>
    """
    task = ["<|transcribe|>"] if source == target else ["<|translate|>", f"<|{target}|>"]
    return ["<|startoftranscript|>", f"<|{source}|>", *task, "<|notimestamps|>"]


@dataclass
class Collator:
    """Clips -> speech (features, or the states of a frozen encoder), source text, decoder input and labels.

    Every clip is decoded into `targets` of the languages, drawn anew each time; its own, a transcription, may
    be among them. With 0 it is only transcribed. The labels are the sentence in the target language, or what
    `outputs` has for the clip.
    """

    store: FeatureStore
    sentences: Sequence[Sentence]
    tokenizer: WhisperTokenizer
    alphabet: Mapping[str, int]  # CTC's classes of the phonemes
    window: int  # frames
    targets: int
    rng: random.Random
    encoded: StateStore | None = None
    outputs: Outputs | None = None

    def __post_init__(self) -> None:
        self._text_ids: dict[tuple[int, str], list[int]] = {}

    @property
    def dataset(self) -> ClipDataset:
        """All clips."""
        lengths = np.diff(self.store.offsets).tolist() if self.encoded is None else self.encoded.lengths
        return ClipDataset(lengths)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Returns: of each clip its `speech`, input_ids and attention_mask [B, T] (source text), pieces [B, T]
        (the same for CTC) and phonemes [B, P]; and of each clip's targets in turn decoder_input_ids and
        labels [B * targets, T'], the prompt's labels ignored but for the source language, which Whisper
        predicts.
        """
        clips = [item["clip"] for item in items]
        sources, phonemes, inputs, labels = [], [], [], []
        for clip in clips:
            source = self.store.languages[clip]
            text = self.text_ids(self.store.sentences[clip], source)
            sources.append([*text, self.tokenizer.eos_token_id])
            spoken = self.store.phonemes[clip]
            phonemes.append([self.alphabet[each] for each in spoken if each in self.alphabet])
            for target in self.rng.sample(LANGUAGES, self.targets) or [source]:
                prompt = self.tokenizer.convert_tokens_to_ids(prompt_tokens(source, target))
                tokens = [*prompt, *self.answer(clip, target)]
                inputs.append(tokens[:-1])
                ignored = [IGNORE] * (len(prompt) - 2)
                labels.append([prompt[1], *ignored, *tokens[len(prompt) :]])
        return {
            **self.speech(clips),
            "input_ids": pad(sources, self.tokenizer.eos_token_id),
            "attention_mask": pad([[1] * len(each) for each in sources], 0),
            "pieces": pad([each[:-1] for each in sources], IGNORE),
            "phonemes": pad(phonemes, IGNORE),
            "decoder_input_ids": pad(inputs, self.tokenizer.eos_token_id),
            "labels": pad(labels, IGNORE),
        }

    def speech(self, clips: Sequence[int]) -> dict[str, Tensor]:
        """input_features float32 [B, mel bins, frames] and feature_lengths [B] (frames without padding); or
        speech_states float32 [B, E, d] and speech_mask [B, E].
        """
        if self.encoded is None:
            features = [self.store.features(clip) for clip in clips]
            frames = padded_frames(max(map(len, features)), self.window, self.rng)
            return {
                "input_features": torch.from_numpy(pad_features(features, frames)),
                "feature_lengths": torch.tensor([len(each) for each in features]),
            }
        states = [torch.from_numpy(self.encoded.states(clip).astype(np.float32)) for clip in clips]
        return {
            "speech_states": pad_sequence(states, batch_first=True),
            "speech_mask": pad([[1] * len(each) for each in states], 0),
        }

    def answer(self, clip: int, language: str) -> list[int]:
        """Tokens that the decoder is to give, with the end token."""
        if self.outputs is not None:
            return self.outputs[clip][LANGUAGES.index(language)]
        return [*self.text_ids(self.store.sentences[clip], language), self.tokenizer.eos_token_id]

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


def alphabet(texts: Iterable[str]) -> dict[str, int]:
    """A class for every character that occurs; 0 is left for CTC's blank."""
    return {char: 1 + i for i, char in enumerate(sorted(set().union(*texts)))}
