"""Encoder states of clips, made once: a frozen encoder need not run again for every pass over them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from kvspn.atomic import atomic
from kvspn.models.modeling import SpeechEncoder
from kvspn.training.store import FeatureStore, pad_features

_BATCH = 32


class StateStore:
    """float16 [states, d] of the clips of a FeatureStore, or of its first ones, memory-mapped."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "index.json").read_text())
        self.lengths: list[int] = index["lengths"]
        self._offsets: list[int] = index["offsets"]
        self._states = np.memmap(folder / "states.f16", np.float16, "r").reshape(-1, index["d_model"])

    def states(self, clip: int) -> np.ndarray:
        """float16 [E, d], those of the silence after the clip included."""
        return self._states[self._offsets[clip] :][: self.lengths[clip]]

    @classmethod
    def build(
        cls,
        folder: Path,
        store: FeatureStore,
        encoder: SpeechEncoder,
        layers: int,
        window: int,
        seed: int,
        most: int | None = None,
    ) -> StateStore:
        """What the encoder's first `layers` layers make of the first `most` clips, in batches of similar
        length, padded as `padded_frames` draws it.

        A folder that is there is whole and is opened as it is.
        """
        if folder.exists():
            return cls(folder)
        rng = random.Random(seed)
        order = np.argsort(np.diff(store.offsets)[:most], kind="stable").tolist()
        lengths, offsets = [0] * len(order), [0] * len(order)
        written = 0
        device = next(encoder.parameters()).device
        with atomic(folder) as part:
            part.mkdir()
            with open(part / "states.f16", "wb") as file:
                for first in range(0, len(order), _BATCH):
                    clips = order[first : first + _BATCH]
                    features = [store.features(clip) for clip in clips]
                    frames = padded_frames(max(map(len, features)), window, rng)
                    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                        batch = torch.from_numpy(pad_features(features, frames)).to(device)
                        states = encoder.below(batch, layers).half().cpu().numpy()
                    file.write(states.tobytes())
                    for clip in clips:
                        lengths[clip], offsets[clip] = states.shape[1], written
                        written += states.shape[1]
            index = {"d_model": states.shape[2], "lengths": lengths, "offsets": offsets}
            (part / "index.json").write_text(json.dumps(index))
        return cls(folder)


def padded_frames(longest: int, window: int, rng: random.Random) -> int:
    """Frames of a batch: for a fifth of them the full window, as in use; else a little over the longest."""
    return window if rng.random() < 0.2 else min(window, longest + rng.randrange(0, 40))
