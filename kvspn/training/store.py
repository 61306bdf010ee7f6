"""Log-mel features and phonemes of the spoken corpus, made once, the features memory-mapped."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import WhisperFeatureExtractor

from kvspn.atomic import atomic
from kvspn.training.speech import SAMPLING_RATE, Voice, augment, synthesize

_CHUNK = 64  # clips a worker makes at a time


@dataclass(frozen=True)
class Clip:
    """One spoken sentence: which, and in which language."""

    sentence: int
    language: str
    text: str


class FeatureStore:
    """Features of all clips, one after the other: float16 [frames, mel bins], and each clip's place."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "index.json").read_text())
        self.sentences: list[int] = index["sentences"]
        self.languages: list[str] = index["languages"]
        self.phonemes: list[str] = index["phonemes"]
        self.offsets = np.cumsum([0, *index["frames"]])
        self._features = np.memmap(folder / "features.f16", np.float16, "r").reshape(-1, index["mel_bins"])

    def __len__(self) -> int:
        return len(self.sentences)

    def features(self, clip: int) -> np.ndarray:
        """float16 [frames, mel bins] of one clip, without the window's padding."""
        return self._features[self.offsets[clip] : self.offsets[clip + 1]]

    @classmethod
    def build(
        cls,
        folder: Path,
        clips: Sequence[Clip],
        extractor: WhisperFeatureExtractor,
        variants: tuple[str, ...],
        seed: int = 0,
        workers: int = 2,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FeatureStore:
        """Speaks every clip in a random voice of `variants`, augments it and stores its features.

        Clips longer than the extractor's window are left out. A folder that is there is whole and is opened
        as it is.
        """
        if folder.exists():
            return cls(folder)
        chunks = [
            (seed + i, clips[i : i + _CHUNK], variants, extractor) for i in range(0, len(clips), _CHUNK)
        ]
        index: dict[str, list[Any]] = {"frames": [], "sentences": [], "languages": [], "phonemes": []}
        with atomic(folder) as part:
            part.mkdir()
            # Fresh processes: a fork of a process in which torch has threads may hang.
            with (
                open(part / "features.f16", "wb") as file,
                multiprocessing.get_context("spawn").Pool(workers) as pool,
            ):
                for done, made in enumerate(pool.imap(_make_chunk, chunks), 1):
                    for clip, features, phonemes in made:
                        file.write(features.tobytes())
                        index["frames"].append(len(features))
                        index["sentences"].append(clip.sentence)
                        index["languages"].append(clip.language)
                        index["phonemes"].append(phonemes)
                    progress(min(done * _CHUNK, len(clips)), len(clips))
            text = json.dumps({"mel_bins": extractor.feature_size, **index})
            (part / "index.json").write_text(text)
        return cls(folder)


def _make_chunk(
    job: tuple[int, Sequence[Clip], tuple[str, ...], WhisperFeatureExtractor],
) -> list[tuple[Clip, np.ndarray, str]]:
    seed, clips, variants, extractor = job
    rng = random.Random(seed)
    spoken = []
    for clip in clips:
        samples, phonemes = synthesize(clip.text, Voice.draw(clip.language, variants, rng))
        samples = augment(samples, rng)
        if len(samples) <= extractor.n_samples:
            spoken.append((clip, samples, phonemes))
    features = log_mel([samples for _, samples, _ in spoken], extractor)
    return [(clip, each, phonemes) for (clip, _, phonemes), each in zip(spoken, features, strict=True)]


def log_mel(clips: Iterable[np.ndarray], extractor: WhisperFeatureExtractor) -> list[np.ndarray]:
    """float16 [frames, mel bins] of each clip, as in a full window but without its padding."""
    clips = list(clips)
    padded = extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features
    reach = extractor.n_fft // 2  # a frame sees that far to both sides of its centre
    frames = [-(-(len(clip) + reach) // extractor.hop_length) for clip in clips]
    return [each[:, :count].T.astype(np.float16) for each, count in zip(padded, frames, strict=True)]


def pad_features(features: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """float32 [B, mel bins, frames], padded with what the extractor gives for silence: 2 under the maximum.

    (Whisper's features are clamped to 8 decades under the window's maximum and divided by 4.)
    """
    batch = np.empty((len(features), frames, features[0].shape[1]), np.float32)
    for row, each in zip(batch, features, strict=True):
        row[: len(each)] = each[:frames]
        row[len(each) :] = each.max() - 2.0
    return batch.transpose(0, 2, 1)
