"""Whisper as transformers saves it: config.json and safetensors, whole or in parts, or .bin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import WhisperConfig

from kvspn.models.checkpoints.checkpoint import Checkpoint
from kvspn.models.checkpoints.files import read_json, read_pickle, tensors
from kvspn.models.checkpoints.vocabulary import generation_settings, read_tokenizer
from kvspn.models.validation import ModelError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of which one must be there, in the order in which they are looked for."""

# What describes the network; the rest of an old config.json belongs to generation or to training.
CONFIG = (
    *("vocab_size", "num_mel_bins", "d_model", "max_source_positions", "max_target_positions"),
    *(
        f"{side}_{what}"
        for side in ("encoder", "decoder")
        for what in ("layers", "attention_heads", "ffn_dim")
    ),
    *("activation_function", "scale_embedding", "tie_word_embeddings"),
    *("dropout", "attention_dropout", "activation_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
)
_DEFAULTS = {each.name: each.default for each in fields(WhisperConfig)}
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises ModelError where there are none, or one is missing."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"the weights are missing ({WEIGHTS[0]})")
    if found.suffix != ".json":
        return [found]
    parts = read_json(found).get("weight_map")
    if not isinstance(parts, Mapping) or not parts:
        raise ModelError(f"{found.name}: weight_map must name a file for each weight")
    files = [folder / Path(str(name)).name for name in sorted(set(map(str, parts.values())))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file.name} is missing, which {found.name} names")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights by name, mapped from their files where the format allows it."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            weights |= tensors(read_pickle(file), file)
    if not any(name.startswith("model.") for name in weights):  # a WhisperModel, without the head
        weights = {f"model.{name}": each for name, each in weights.items()}
    return weights


def read(folder: Path) -> Checkpoint:
    """A folder with a Hugging Face Whisper. Raises ModelError, ValueError or OSError for what is wrong."""
    settings = read_json(folder / "config.json")
    config = {name: settings.get(name, _DEFAULTS.get(name)) for name in CONFIG}
    weights = read_weights(folder)
    tokenizer = read_tokenizer(
        folder, config["vocab_size"], "put that of the Whisper it was trained from beside"
    )
    return Checkpoint(
        "Hugging Face",
        "config.json",
        config,
        weights,
        tokenizer,
        _generation(folder, settings, generation_settings(tokenizer, config["vocab_size"])),
        _features(folder),
    )


def _generation(folder: Path, settings: Mapping[str, Any], built: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json says; what it lacks, or all of it where it is missing, as built."""
    file = folder / "generation_config.json"
    if not file.is_file():  # before 2023 config.json had the suppressed tokens
        return built | {name: settings[name] for name in _SUPPRESSED if settings.get(name) is not None}
    given = {name: value for name, value in read_json(file).items() if value is not None}
    kept = {name: value for name, value in built.items() if name not in _SUPPRESSED}
    if given.get("is_multilingual", built["is_multilingual"]) is False:
        for name in ("lang_to_id", "task_to_id"):
            kept.pop(name, None)
            given.pop(name, None)
    return kept | given


def _features(folder: Path) -> Mapping[str, Any]:
    """The preprocessor's settings; empty where the folder has none, as a checkpoint of a training run."""
    single, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    if single.is_file():
        return read_json(single)
    found = read_json(joint).get("feature_extractor") if joint.is_file() else None
    return found if isinstance(found, Mapping) else {}
