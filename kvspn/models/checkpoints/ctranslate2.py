"""Whisper as CTranslate2 saves it, and so faster-whisper: model.bin beside config.json and tokenizer.json.

model.bin, little-endian, strings with a uint16 length that counts their final zero: uint32 version, string
specification, uint32 revision, uint32 count; of each variable its name, uint8 rank, uint32 dimensions, uint8
dtype, uint32 bytes, and the data; then uint32 count and pairs of names, an alias and its variable.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvspn.models.checkpoints.checkpoint import Checkpoint
from kvspn.models.checkpoints.files import read_json
from kvspn.models.checkpoints.vocabulary import generation_settings, read_tokenizer
from kvspn.models.validation import ModelError

FILE = "model.bin"
SPECIFICATION = "WhisperSpec"
_VERSIONS = range(4, 7)  # earlier ones hold no dtype
_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
_MOST_DIMENSIONS = 4

# A module of ours and its name in CTranslate2, per kind; {i} is a layer.
_NORMS = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "encoder_attn_layer_norm": "attention/layer_norm",
    "final_layer_norm": "ffn/layer_norm",
}
_TABLES = {
    "model.encoder.embed_positions.weight": "encoder/position_encodings/encodings",
    "model.decoder.embed_positions.weight": "decoder/position_encodings/encodings",
    "model.decoder.embed_tokens.weight": "decoder/embeddings/weight",
    "proj_out.weight": "decoder/projection/weight",
}


class _Reader:
    """Consumes the bytes of a model.bin; every count is held against what is left of them."""

    def __init__(self, content: np.ndarray) -> None:
        self._content = content
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        if count > len(self._content) - self._at:
            raise ModelError(
                f"{FILE}: cut short, or damaged: {count} bytes wanted at {self._at} of {len(self._content)}"
            )
        self._at += count
        return self._content[self._at - count : self._at]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)).tobytes())[0])

    def text(self) -> str:
        try:
            return self.take(self.number("H")).tobytes().removesuffix(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{FILE}: damaged: a name at {self._at} is not UTF-8") from error

    def header(self) -> tuple[list[int], torch.dtype, int]:
        """A variable's dimensions, dtype and bytes, which follow."""
        rank = self.number("B")
        if rank > _MOST_DIMENSIONS:
            raise ModelError(f"{FILE}: damaged: a variable of {rank} dimensions at {self._at}")
        dimensions = [self.number("I") for _ in range(rank)]
        code, size = self.number("B"), self.number("I")
        if code >= len(_DTYPES):
            raise ModelError(f"{FILE}: damaged: unknown dtype {code} at {self._at}")
        dtype = _DTYPES[code]
        if size != math.prod(dimensions) * dtype.itemsize:
            raise ModelError(f"{FILE}: damaged: {size} bytes at {self._at} are no {dimensions} of {dtype}")
        return dimensions, dtype, size

    def variable(self) -> Tensor:
        dimensions, dtype, size = self.header()
        if not size:
            return torch.empty(dimensions, dtype=dtype)
        # A copy, aligned, of what the file is known to hold.
        return torch.frombuffer(bytearray(self.take(size)), dtype=dtype).view(dimensions)


def read_variables(files: Sequence[Path]) -> dict[str, Tensor]:
    """Every variable of a model.bin, which may lie in several files, by name, aliases included."""
    reader = _open(files)
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        variables[name] = reader.variable()
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name not in variables:
            raise ModelError(f"{FILE}: damaged: an alias of {name!r:.80}, which it does not hold")
        variables[alias] = variables[name]
    return variables


def read_sizes(files: Sequence[Path]) -> dict[str, list[int]]:
    """The dimensions of every variable of a model.bin by name; their numbers are not read."""
    reader = _open(files)
    sizes = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        sizes[name], _dtype, size = reader.header()
        reader.take(size)
    return sizes


def _open(files: Sequence[Path]) -> _Reader:
    """A model.bin at its count of variables. Raises ModelError where it is no Whisper's."""
    parts = [
        np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8) for file in files
    ]
    reader = _Reader(parts[0] if len(parts) == 1 else np.concatenate(parts))
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ModelError(f"{FILE}: must be a CTranslate2 model of version 4 to 6, got version {version}")
    if (specification := reader.text()) != SPECIFICATION:
        raise ModelError(f"{FILE}: must be a Whisper ({SPECIFICATION}), got {specification!r:.80}")
    reader.number("I")  # the specification's revision, on which a Whisper's variables do not depend
    return reader


def read(folder: Path, files: Sequence[Path] = ()) -> Checkpoint:
    """A folder with a CTranslate2 Whisper; `files` where the model lies in parts elsewhere.

    Raises ModelError, ValueError or OSError for what is wrong.
    """
    weights, heads = translate_names(_Variables(read_variables(files or [folder / FILE])))
    embedding, positions = (
        weights["model.decoder.embed_tokens.weight"],
        weights["model.encoder.embed_positions.weight"],
    )
    head = weights.get("proj_out.weight")
    said = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    vocab_size, width = embedding.shape
    tokenizer = read_tokenizer(
        folder, vocab_size, f"put the tokenizer.json of a Whisper with {vocab_size} tokens there"
    )
    _check_words(folder, tokenizer, vocab_size)
    generation = generation_settings(tokenizer, vocab_size)
    for name, key in (
        ("suppress_tokens", "suppress_ids"),
        ("begin_suppress_tokens", "suppress_ids_begin"),
        ("alignment_heads", "alignment_heads"),
    ):
        if said.get(key) is not None:
            generation[name] = said[key]
    config = {
        "vocab_size": vocab_size,
        "d_model": width,
        "num_mel_bins": weights["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(positions),
        "max_target_positions": len(weights["model.decoder.embed_positions.weight"]),
        "tie_word_embeddings": head is None or torch.equal(head, embedding),
        **heads,
        **_sizes(weights),
        **{
            name: generation[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        },
    }
    features = folder / "preprocessor_config.json"
    return Checkpoint(
        "CTranslate2",
        FILE,
        config,
        weights,
        tokenizer,
        generation,
        read_json(features) if features.is_file() else {},
    )


class _Variables:
    """The variables of a model.bin, each taken once, in floats."""

    def __init__(self, variables: Mapping[str, Tensor]) -> None:
        self.left = dict(variables)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ModelError(f"{FILE}: lacks {name}, which a Whisper has")
        return self.left.pop(name)

    def floats(self, name: str) -> Tensor:
        """A weight; of an integer one each output divided by its scale."""
        weight = self.take(name)
        if weight.is_floating_point():
            return weight
        scale = self.take(f"{name}_scale").float().reshape(-1)
        if len(scale) not in (1, len(weight)) or not scale.isfinite().all() or not scale.all():
            raise ModelError(
                f"{FILE}: {name}_scale must hold one finite scale for each of {len(weight)} outputs"
            )
        return weight.float() / scale.view(-1, *[1] * (weight.dim() - 1))

    def count(self, name: str) -> int:
        return int(self.take(name).reshape(-1)[0])


def translate_names(variables: _Variables) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights by transformers' names, and the attention heads of encoder and decoder.

    Raises ModelError for what is missing, or no Whisper's.
    """
    weights: dict[str, Tensor] = {}
    for name, theirs in _TABLES.items():
        if name != "proj_out.weight" or theirs in variables:
            weights[name] = variables.floats(theirs)
    for convolution in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            weights[f"model.encoder.{convolution}.{part}"] = variables.floats(f"encoder/{convolution}/{part}")

    def linear(name: str, theirs: str) -> None:
        for part in ("weight", "bias"):
            weights[f"{name}.{part}"] = variables.floats(f"{theirs}/{part}")

    def norm(name: str, theirs: str) -> None:
        weights[f"{name}.weight"] = variables.floats(f"{theirs}/gamma")
        weights[f"{name}.bias"] = variables.floats(f"{theirs}/beta")

    def attention(name: str, theirs: str, stacks: Sequence[str]) -> None:
        """`stacks`: the projections that lie in one matrix each, of q, k, v; the output's is the last."""
        for i, stacked in enumerate(stacks):
            for part in ("weight", "bias"):
                whole = variables.floats(f"{theirs}/linear_{i}/{part}")
                if not whole.dim() or len(whole) % len(stacked):
                    raise ModelError(
                        f"{FILE}: {theirs}/linear_{i}/{part} must hold {len(stacked)} parts alike"
                    )
                for letter, each in zip(stacked, whole.chunk(len(stacked)), strict=True):
                    if (letter, part) != ("k", "bias"):  # zeros: Whisper's keys have none
                        weights[f"{name}.{letter}_proj.{part}"] = each
                    elif each.any():
                        raise ModelError(f"{FILE}: {theirs}/linear_{i}/bias must have no bias for keys")
        linear(f"{name}.out_proj", f"{theirs}/linear_{len(stacks)}")

    heads = {}
    for side in ("encoder", "decoder"):
        heads[f"{side}_attention_heads"] = variables.count(f"{side}/num_heads")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        numbers = [
            int(found[1]) for name in variables.left if (found := re.match(rf"{side}/layer_(\d+)/", name))
        ]
        for i in range(max(numbers, default=-1) + 1):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for name, their_name in _NORMS.items():
                if side == "decoder" or name != "encoder_attn_layer_norm":
                    norm(f"{ours}.{name}", f"{theirs}/{their_name}")
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", ["qkv"])
            if side == "decoder":
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", ["q", "kv"])
            linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    # Flags of the network are single numbers; a matrix that nobody has asked for is another network's.
    if unknown := [name for name, left in variables.left.items() if left.dim() > 1]:
        raise ModelError(f"{FILE}: holds {unknown[0]}, which a Whisper has not")
    return weights, heads


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Layers and FFN widths of encoder and decoder."""
    found: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        first = f"model.{side}.layers."
        layers = {name[len(first) :].partition(".")[0] for name in weights if name.startswith(first)}
        if not layers:
            raise ModelError(f"{FILE}: the {side} has no layers")
        found |= {
            f"{side}_layers": len(layers),
            f"{side}_ffn_dim": len(weights[f"{first}0.fc1.weight"]),
        }
    return found


def _check_words(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """The model's own list of its tokens against the tokenizer. Raises ModelError where they differ."""
    as_json, as_text = folder / "vocabulary.json", folder / "vocabulary.txt"
    if as_json.is_file():
        words = json.loads(as_json.read_text("utf-8"))
    elif as_text.is_file():
        words = as_text.read_text("utf-8").removesuffix("\n").split("\n")
    else:
        return
    file = as_json if as_json.is_file() else as_text
    if not isinstance(words, list) or len(words) != vocab_size:
        raise ModelError(f"{file.name}: must hold the model's {vocab_size} tokens, got {len(words)}")
    for token, i in tokenizer.get_added_vocab().items():
        if words[i] != token:
            raise ModelError(
                f"the tokenizer must be the model's: token {i} is {token}, in {file.name} {words[i]!r:.40}"
            )
