"""Other runtimes on the same speech, for `kvspn evaluate --speech ... --peers`.

One module each, imported only when it is asked for (`kvspn.measure.peers.load`):

    FORMATS: the weight formats it has.
    prepare(whisper, processor, fmt, task) -> Recogniser: greedy, without timestamps, the language told.

All take the weights that kvspn has read, whatever format they were in, as transformers' model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

PEERS = ("transformers", "faster_whisper", "whisper_cpp")

Recogniser = Callable[[np.ndarray, str], list[int]]
"""Samples, float32 [N] at 16 kHz, and the language spoken -> the token ids of the text."""


def as_whisper(model: Any) -> WhisperForConditionalGeneration:
    """transformers' own Whisper with the weights of one that kvspn has opened; none is copied.

    Raises ValueError for a whisperM2M, which no other runtime knows.
    """
    if model.model.text_encoder is not None or model.config.target_languages != []:
        raise ValueError("peers must be left out for a whisperM2M, which no other runtime knows")
    said = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("kvspn.")}
    with torch.device("meta"):
        whisper = WhisperForConditionalGeneration(WhisperConfig.from_dict(said))
    whisper.load_state_dict(state, assign=True)
    whisper.tie_weights()
    whisper.generation_config = model.generation_config
    return whisper.eval()
