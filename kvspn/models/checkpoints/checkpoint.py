"""What every checkpoint format is read into: a Whisper in Hugging Face's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Checkpoint:
    """A Whisper as its files hold it.

    format: what the files are, for people to read; file: the one that says how large the network is.
    config: fields of WhisperConfig that describe the network and its special tokens.
    weights: by the names of transformers' WhisperForConditionalGeneration, in the files' dtype.
    tokenizer: a WhisperTokenizer.
    generation: fields of a generation configuration: languages, tasks and suppressed tokens.
    features: settings of the feature extractor where the files say any.
    """

    format: str
    file: str
    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    tokenizer: Any
    generation: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
