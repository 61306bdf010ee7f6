"""What the base model hears and says: encoder states and greedy outputs of windows, kept on the disk.

In shards of a few windows, each a folder that is whole or not there, so that a run that is interrupted goes
on with the shard at which it stopped, and several processes make shards of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvspn.atomic import atomic
from kvspn.decoding import DecodeStats, compression_ratio
from kvspn.engines import Engine
from kvspn.models import WhisperM2MForConditionalGeneration, WhisperM2MProcessor, prompts, settings
from kvspn.models.languages import likely_languages
from kvspn.models.validation import SAMPLING_RATE
from kvspn.training.draft.recipe import DraftRecipe
from kvspn.training.draft.windows import Clip, Load, Window, window_samples
from kvspn.training.states import StateStore

SHARD = 8
"""Windows of a shard."""

_REPEATS = 2.4  # a text that compresses better repeats itself: Whisper tries another temperature then


@dataclass(frozen=True)
class Output:
    """What the base said of a window.

    language, task, timed: of what kind it is. prompt: its tokens, from the start of the transcript. tokens:
    those behind it, with the end token unless a limit came first.
    """

    language: str
    task: str
    timed: bool
    prompt: list[int]
    tokens: list[int]


class Speaker:
    """A base model that listens to windows and says what it hears, greedily, in every way that it can."""

    def __init__(
        self,
        model: WhisperM2MForConditionalGeneration,
        processor: WhisperM2MProcessor,
        recipe: DraftRecipe,
    ) -> None:
        self._model = model
        self._processor = processor
        self._recipe = recipe
        self._said = settings.merge(model.generation_config, None, {})
        self._languages = prompts.language_ids(self._said)
        timestamps = model.config.vocab_size > self._said["no_timestamps_token_id"] + 1
        self._timed = (False, True) if timestamps and recipe.timestamps else (False,)
        self._start = self._said.get("decoder_start_token_id", model.config.decoder_start_token_id)
        self._engines: dict[int, Engine] = {}

    @torch.inference_mode()
    def hear(self, samples: np.ndarray, language: str | None) -> tuple[Tensor, list[Output]]:
        """Samples [N] of at most a window -> encoder states [E, d] and the outputs.

        Raises ValueError for a language that the model does not know.
        """
        features = self._processor(samples, sampling_rate=SAMPLING_RATE).input_features
        states = self._model.encode(features.to(self._model.device))[0]
        states = states.half().to(states.dtype)  # as they are kept
        return states, [output for output, _ in self.say(states, language or self._detect(states))]

    @torch.inference_mode()
    def say(self, states: Tensor, language: str, draft: bool = False) -> list[tuple[Output, DecodeStats]]:
        """Encoder states [E, d] -> the outputs and what they took; as in use without those that repeat
        themselves. `draft`: whether the draft network guesses them.
        """
        targets = [language]
        if self._languages and self._recipe.translate and language != "en":
            targets.append("en")
        outputs: list[tuple[Output, DecodeStats]] = []
        for timed in self._timed:
            made: Any = self._model.generate(
                encoder_outputs=([states] * len(targets),),
                language=language,
                target_language=targets if self._languages else None,
                return_timestamps=timed,
                draft=draft,
                max_new_tokens=self._model.config.max_target_positions // 2,
                return_dict_in_generate=True,
                engine=self._engine(len(targets)),
            )
            rows = zip(targets, made.sequences.tolist(), made.stats, strict=True)
            for target, tokens, stats in rows:
                said = tokens[: stats.tokens]
                if self._repeats(said):
                    continue
                after = prompts.after_start(
                    *(self._said, self._languages, language, target, None, ()), timed=timed
                )
                task = "transcribe" if target == language else "translate"
                outputs.append((Output(language, task, timed, [self._start, *after], said), stats))
        return outputs

    def _detect(self, states: Tensor) -> str:
        if not self._languages:
            return "en"
        (likely,) = likely_languages(self._engine(1), [states], self._start, self._languages)
        return next(iter(likely))

    def _repeats(self, tokens: Sequence[int]) -> bool:
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return compression_ratio(text.strip()) > _REPEATS

    def _engine(self, rows: int) -> Engine:
        if rows not in self._engines:
            positions = self._model.config.max_source_positions
            self._engines[rows] = self._model.engine(rows, positions, weights=self._recipe.weights)
        return self._engines[rows]


def make_shard(
    folder: Path, windows: Sequence[Window], clips: Sequence[Clip], load: Load, speaker: Speaker
) -> None:
    """Writes what `speaker` makes of these windows, unless it is there."""
    if folder.exists():
        return
    lengths, said = [], []
    with atomic(folder) as part:
        part.mkdir()
        width = 0
        with open(part / "states.f16", "wb") as file:
            for window in windows:
                samples = window_samples(window, clips, load)
                outputs: list[Output] = []
                if samples is not None:
                    states, outputs = speaker.hear(samples, clips[window[0].clip].language)
                    width = states.shape[1]
                if outputs:
                    file.write(states.half().cpu().numpy().tobytes())
                lengths.append(len(states) if outputs else 0)
                said.append([asdict(each) for each in outputs])
            if not file.tell():
                file.write(bytes(2 * max(1, width)))  # An empty file cannot be mapped.
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        index = {"d_model": max(1, width), "lengths": lengths, "offsets": offsets, "outputs": said}
        (part / "index.json").write_text(json.dumps(index))


class Shards:
    """States and outputs of the windows of some shards that are there; those without outputs are left out."""

    def __init__(self, folders: Sequence[Path]):
        self._places: list[tuple[StateStore, int]] = []
        self.outputs: list[list[Output]] = []
        self.left_out = 0
        for folder in folders:
            store = StateStore(folder)
            for number, said in enumerate(json.loads((folder / "index.json").read_text())["outputs"]):
                if said:
                    self._places.append((store, number))
                    self.outputs.append([Output(**each) for each in said])
                else:
                    self.left_out += 1

    def __len__(self) -> int:
        return len(self.outputs)

    def states(self, window: int) -> np.ndarray:
        """float16 [E, d]"""
        store, number = self._places[window]
        return store.states(number)


def shard_folders(folder: Path, windows: Sequence[Window]) -> Iterator[tuple[Path, Sequence[Window]]]:
    """The shards of windows, in order."""
    for first in range(0, len(windows), SHARD):
        yield folder / f"{first // SHARD:06d}", windows[first : first + SHARD]
