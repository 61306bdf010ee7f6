"""What a model's folder says of itself, held against its weights and against what decoding needs.

Each check raises ModelError with one line: the file, the field, what it must be and what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

from kvspn.models.settings import merge

SAMPLING_RATE = 16_000

_LAYERS = {
    "encoder_layers": "model.encoder.layers.",
    "decoder_layers": "model.decoder.layers.",
    "text_encoder_layers": "model.text_encoder.layers.",
    "kvspn_blocks": "kvspn.blocks.",
}
"""What the weights' names begin with for the layers that a field of the configuration counts."""

_SIZES = {
    "vocab_size": ("model.decoder.embed_tokens.weight", 0),
    "d_model": ("model.decoder.embed_tokens.weight", 1),
    "num_mel_bins": ("model.encoder.conv1.weight", 1),
    "max_source_positions": ("model.encoder.embed_positions.weight", 0),
    "max_target_positions": ("model.decoder.embed_positions.weight", 0),
    "max_text_positions": ("model.text_encoder.embed_positions.weight", 0),
    "encoder_ffn_dim": ("model.encoder.layers.0.fc1.weight", 0),
    "decoder_ffn_dim": ("model.decoder.layers.0.fc1.weight", 0),
    "text_encoder_ffn_dim": ("model.text_encoder.layers.0.fc1.weight", 0),
    "kvspn_ffn_dim": ("kvspn.blocks.0.fc1.weight", 0),
    "kvspn_draft_vocab_size": ("kvspn.draft_ids", 0),
}
"""The tensor, and the dimension of it, that a field of the configuration gives; unused where it is absent."""


class ModelError(ValueError):
    """A model folder that cannot be used: one line that names it and says what is missing or wrong."""


def check_config(
    config: WhisperConfig, shapes: Mapping[str, tuple[int, ...]], file: str = "config.json"
) -> None:
    """The configuration, from `file`, against the shapes of the weights, before anything is made of it."""
    for field, prefix in _LAYERS.items():
        layers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
        if (wanted := getattr(config, field, 0)) != len(layers):
            raise _wrong(file, field, f"{len(layers)}, as in the weights", wanted)
    for field, (name, dimension) in _SIZES.items():
        wanted, shape = getattr(config, field, None), shapes.get(name, ())
        if len(shape) > dimension and wanted != shape[dimension]:
            raise _wrong(file, field, f"{shape[dimension]}, as in the weights", wanted)
    for field in ("encoder_attention_heads", "decoder_attention_heads"):
        if (heads := getattr(config, field)) < 1 or config.d_model % heads:
            raise _wrong(file, field, f"a divisor of d_model ({config.d_model})", heads)
    for field in ("dropout", "attention_dropout", "activation_dropout"):
        if not 0 <= (rate := getattr(config, field)) <= 1:
            raise _wrong(file, field, "from 0 to 1", rate)
    for field in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
        _check_token(file, field, getattr(config, field), config.vocab_size)


def check_generation(
    ids: Mapping[str, Any],
    config: WhisperConfig,
    file: str = "generation_config.json",
    *,
    english_only: bool = False,
) -> None:
    """The ids of languages, tasks and suppressed tokens, which make Whisper's prompt and masks.

    And `generate` honours whatever else is set. `english_only`: whether a model without languages will do.
    """
    size = config.vocab_size
    if ids.get("is_multilingual", True) is not False:
        _check_languages(ids, file, size)
    elif not english_only:
        raise ModelError(f"{file} names no languages: an English-only model (is_multilingual is false)")
    if ids.get("no_timestamps_token_id") == 0:
        raise _wrong(file, "no_timestamps_token_id", "that of <|notimestamps|>", 0)
    _check_token(file, "no_timestamps_token_id", ids.get("no_timestamps_token_id"), size)
    for field in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id"):
        tokens = ids.get(field)
        if isinstance(tokens, int):
            tokens = [tokens]
        if not isinstance(tokens, list | None):
            raise _wrong(file, field, "a list of token ids", tokens)
        for token in tokens or ():
            _check_token(file, field, token, size)
    for field in ("pad_token_id", "decoder_start_token_id", "prev_sot_token_id"):
        if (token := ids.get(field)) is not None:
            _check_token(file, field, token, size)
    try:
        merge(GenerationConfig.from_dict(dict(ids)), None, {})
    except Exception as error:
        raise ModelError(f"{file}: {reason(error)}") from error


def _check_languages(ids: Mapping[str, Any], file: str, size: int) -> None:
    languages, tasks = ids.get("lang_to_id"), ids.get("task_to_id")
    if not isinstance(languages, Mapping) or not languages:
        what = 'a token id for each language ("<|de|>", ...)'
        raise ModelError(f"{file} names no languages: lang_to_id must be {what}, got {short(languages)}")
    for language, token in languages.items():
        _check_token(file, f"lang_to_id[{language!r}]", token, size)
    if not isinstance(tasks, Mapping):
        raise _wrong(file, "task_to_id", 'token ids of "transcribe" and "translate"', tasks)
    for task in ("transcribe", "translate"):
        _check_token(file, f"task_to_id[{task!r}]", tasks.get(task), size)


def check_features(settings: Mapping[str, Any], config: WhisperConfig) -> None:
    """The preprocessor's settings against the model's window, before its filters are made."""
    file, frames = "preprocessor_config.json", 2 * config.max_source_positions
    # The defaults of WhisperFeatureExtractor.
    defaults = {"feature_size": 80, "sampling_rate": SAMPLING_RATE, "hop_length": 160, "chunk_length": 30}
    given = {**defaults, "n_fft": 400, **settings}
    for field in (*defaults, "n_fft"):
        if type(given[field]) is not int or given[field] < 1:
            raise _wrong(file, field, "a whole number from 1", given[field])
    for field, wanted in (("feature_size", config.num_mel_bins), ("sampling_rate", SAMPLING_RATE)):
        if given[field] != wanted:
            raise _wrong(file, field, f"{wanted}, as the model takes it", given[field])
    samples = given["chunk_length"] * SAMPLING_RATE
    if (found := samples // given["hop_length"]) != frames:
        raise ModelError(f"{file}: the preprocessor makes {found} frames, the model takes {frames}")
    if given["n_fft"] > samples:
        raise _wrong(file, "n_fft", f"at most the window's {samples} samples", given["n_fft"])


def check_processor(processor: WhisperProcessor, config: WhisperConfig) -> None:
    """Features of a second of silence, and an empty text: many a setting shows its fault in use alone."""
    try:
        silence = np.zeros(SAMPLING_RATE, np.float32)
        features = processor.feature_extractor(silence, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        features = features.input_features
    except Exception as error:
        raise ModelError(f"preprocessor_config.json: cannot make features: {reason(error)}") from error
    wanted = (1, config.num_mel_bins, 2 * config.max_source_positions)
    if tuple(features.shape) != wanted or not features.isfinite().all():
        found = f"{tuple(features.shape)}{'' if features.isfinite().all() else ' with NaN or infinity'}"
        raise ModelError(f"preprocessor_config.json: features must be finite, {wanted}, got {found}")
    try:
        processor.tokenizer(processor.tokenizer.eos_token, add_special_tokens=False)
        processor.tokenizer.decode([config.eos_token_id], skip_special_tokens=True)
    except Exception as error:
        raise ModelError(f"the tokenizer cannot be used: {reason(error)}") from error


def reason(error: Exception) -> str:
    """One line of what another library says is wrong."""
    line = " ".join(str(error).split())[:400]
    return line if isinstance(error, ValueError | OSError) and line else f"{type(error).__name__}: {line}"


def check_weights(model: torch.nn.Module) -> None:
    """No weight is NaN or infinite, and the draft vocabulary is one of tokens that exist."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            if not all(map(torch.isfinite, tensor.aminmax())):
                raise ModelError(f"the weights hold NaN or infinity, in {name}")
        elif name == "kvspn.draft_ids":
            for token in tensor.aminmax():
                _check_token("the weights", name, int(token), model.config.vocab_size)


def _check_token(file: str, field: str, token: object, vocab_size: int) -> None:
    if type(token) is not int or not 0 <= token < vocab_size:
        raise _wrong(file, field, f"a token id from 0 to {vocab_size - 1}", token)


def _wrong(file: str, field: str, wanted: str, found: object) -> ModelError:
    return ModelError(f"{file}: {field} must be {wanted}, got {short(found)}")
