"""What the base model itself makes of the clips: the tokens among which its draft network has to guess."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvspn.atomic import atomic
from kvspn.engines import Engine
from kvspn.models.modeling import WhisperM2MForConditionalGeneration
from kvspn.training.corpus import LANGUAGES
from kvspn.training.states import StateStore

_CLIPS = 8  # decoded together
_MOST = 64  # tokens: what goes on for longer says the same again and again

Outputs = list[list[list[int]]]


@torch.no_grad()
def greedy_outputs(
    path: Path, model: WhisperM2MForConditionalGeneration, encoded: StateStore, languages: Sequence[str]
) -> Outputs:
    """Of each clip, for each of LANGUAGES, the token ids of greedy decoding, without the prompt.

    Args:
        path: the JSON file that keeps them; read where it is there.
        encoded: the clips' states above all of the encoder's layers.
        languages: the clips' own.
    """
    if path.exists():
        return json.loads(path.read_text())
    engines: dict[int, Engine] = {}
    outputs: Outputs = []
    for first in range(0, len(encoded.lengths), _CLIPS):
        clips = range(first, min(first + _CLIPS, len(encoded.lengths)))
        rows = [states for clip in clips for states in [_states(model, encoded, clip)] * len(LANGUAGES)]
        if len(rows) not in engines:
            engines[len(rows)] = model.engine(len(rows), model.config.max_source_positions)
        made: Any = model.generate(
            encoder_outputs=(rows,),
            language=[languages[clip] for clip in clips for _ in LANGUAGES],
            target_language=[target for _ in clips for target in LANGUAGES],
            draft=False,
            max_new_tokens=_MOST,
            return_dict_in_generate=True,
            engine=engines[len(rows)],
        )
        said = [
            tokens[: stats.tokens] for tokens, stats in zip(made.sequences.tolist(), made.stats, strict=True)
        ]
        outputs += [said[row : row + len(LANGUAGES)] for row in range(0, len(said), len(LANGUAGES))]
    with atomic(path) as part:
        part.write_text(json.dumps(outputs))
    return outputs


def _states(model: WhisperM2MForConditionalGeneration, encoded: StateStore, clip: int) -> Tensor:
    """[E, d]"""
    encoder = model.model.encoder
    states = torch.from_numpy(encoded.states(clip).astype(np.float32)).to(model.device)
    return encoder.above(states[None], len(encoder.layers))[0]
