"""Whisper as OpenAI publishes it: one .pt file of `dims` and `model_state_dict`, without a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvspn.models.checkpoints.checkpoint import Checkpoint
from kvspn.models.checkpoints.files import read_pickle, tensors
from kvspn.models.checkpoints.vocabulary import generation_settings, read_tokenizer
from kvspn.models.validation import ModelError

_DIMS = {
    "n_mels": "num_mel_bins",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}

# In this order: a name is changed by each that it holds.
_NAMES = (
    (".blocks.", ".layers."),
    (".cross_attn_ln.", ".encoder_attn_layer_norm."),
    (".cross_attn.", ".encoder_attn."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".attn.", ".self_attn."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    ("attn.out.", "attn.out_proj."),
    (".mlp_ln.", ".final_layer_norm."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    ("encoder.ln_post.", "encoder.layer_norm."),
    ("decoder.ln.", "decoder.layer_norm."),
    (".token_embedding.", ".embed_tokens."),
    (".positional_embedding", ".embed_positions.weight"),
)


def read(file: Path, tokenizers: Mapping[int, Path]) -> Checkpoint:
    """A .pt file, with the tokenizer that lies beside it.

    Args:
        tokenizers: folders with a tokenizer by their vocabulary's size, for a file that has none beside it.

    Raises ModelError, ValueError or OSError for what is wrong.
    """
    content = read_pickle(file)
    dims, state = content.get("dims"), content.get("model_state_dict")
    if not isinstance(dims, Mapping) or not isinstance(state, Mapping):
        raise ModelError(f"{file.name}: must be OpenAI's Whisper, with dims and model_state_dict")
    for name in _DIMS:
        if type(dims.get(name)) is not int:
            raise ModelError(
                f"{file.name}: dims must hold a whole number as {name}, got {dims.get(name)!r:.40}"
            )
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise ModelError(f"{file.name}: encoder and decoder must be equally wide, got {dims}")
    weights = {_rename(name): each for name, each in tensors(state, file).items()}
    config: dict[str, Any] = {field: dims[name] for name, field in _DIMS.items()}
    for side in ("encoder", "decoder"):
        first = weights.get(f"model.{side}.layers.0.fc1.weight")
        if first is None:
            raise ModelError(f"{file.name}: the {side} has no layers")
        config[f"{side}_ffn_dim"] = len(first)
    size = config["vocab_size"]
    beside = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = read_tokenizer(
        file.parent if beside else tokenizers.get(size, file.parent),
        size,
        f"{file.name} holds none: put the tokenizer.json of a Whisper with {size} tokens beside it",
    )
    generation = generation_settings(tokenizer, size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        config[name] = generation[name]
    return Checkpoint("OpenAI", file.name, config, weights, tokenizer, generation)


def _rename(name: str) -> str:
    """ "decoder.blocks.0.attn.query.weight" -> "model.decoder.layers.0.self_attn.q_proj.weight"."""
    name = f"model.{name}"
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name
