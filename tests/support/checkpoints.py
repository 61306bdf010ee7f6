"""A Whisper in the formats that people have it in, written as their own tools write it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

CODES = {np.float32: 0, np.int8: 1, np.int16: 2, np.int32: 3, np.float16: 4}


def text(word: str) -> bytes:
    return struct.pack("<H", len(word.encode()) + 1) + word.encode() + b"\0"


def pack(variables: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None, **head: Any) -> bytes:
    """model.bin of CTranslate2; `head`: version, spec, count, where they are not the usual ones."""
    parts = [
        struct.pack("<I", head.get("version", 6)),
        text(head.get("spec", "WhisperSpec")),
        struct.pack("<II", 3, head.get("count", len(variables))),
    ]
    for name, each in variables.items():
        parts += [text(name), struct.pack(f"<B{each.ndim}I", each.ndim, *each.shape)]
        parts += [struct.pack("<BI", CODES[each.dtype.type], each.nbytes), each.tobytes()]
    aliases = aliases or {}
    parts.append(struct.pack("<I", len(aliases)))
    return b"".join(parts + [text(name) for pair in aliases.items() for name in pair])


def variables(state: Mapping[str, Tensor], heads: int) -> dict[str, np.ndarray]:
    """The weights by CTranslate2's names, in fp32."""
    found: dict[str, np.ndarray] = {}
    weights = {name: weight.float().numpy() for name, weight in state.items()}

    def linear(theirs: str, *ours: str) -> None:
        matrices = [weights[f"{name}.weight"] for name in ours]
        # Whisper's keys have no bias: CTranslate2 writes zeros.
        biases = [weights.get(f"{name}.bias", np.zeros(len(matrices[0]), np.float32)) for name in ours]
        found[f"{theirs}/weight"], found[f"{theirs}/bias"] = np.concatenate(matrices), np.concatenate(biases)

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = (
            weights[f"{ours}.{x}"] for x in ("weight", "bias")
        )

    for side in ("encoder", "decoder"):
        model = f"model.{side}"
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/pre_norm"] = np.array(1, np.int8)
        found[f"{side}/position_encodings/encodings"] = weights[f"{model}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{model}.layer_norm")
        if side == "encoder":
            for name in ("conv1", "conv2"):
                linear(f"encoder/{name}", f"{model}.{name}")
        else:
            found["decoder/embeddings/weight"] = weights[f"{model}.embed_tokens.weight"]
        layers = {int(name.split(".")[3]) for name in weights if name.startswith(f"{model}.layers.")}
        for i in sorted(layers):
            ours, theirs = f"{model}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return found


def stored(weights: Mapping[str, np.ndarray], form: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Variables as CTranslate2 stores them in a format, and its aliases."""
    found: dict[str, np.ndarray] = {}
    for name, each in weights.items():
        matrix = name.endswith("/weight")
        if each.dtype != np.float32 or form == "float32" or (form.startswith("int") and not matrix):
            found[name] = each
        elif form == "float16":
            found[name] = each.astype(np.float16)
        elif form == "int16":
            scale = np.float32(2**10 / np.abs(each).max())
            found[name], found[f"{name}_scale"] = np.rint(each * scale).astype(np.int16), scale.reshape(())
        else:
            rows = each.reshape(len(each), -1)
            largest = np.abs(rows).max(1)
            scale = 127 / np.where(largest, largest, np.float32(127))
            found[name] = np.rint(rows * scale[:, None]).astype(np.int8).reshape(each.shape)
            found[f"{name}_scale"] = scale
    head = {"decoder/projection/weight": "decoder/embeddings/weight"}
    if "decoder/embeddings/weight_scale" in found:
        head["decoder/projection/weight_scale"] = "decoder/embeddings/weight_scale"
    return found, head


def save_ctranslate2(folder: Path, whisper: Path, form: str = "float32") -> Path:
    """A Hugging Face folder as CTranslate2 converts it, its suppressed tokens in config.json."""
    folder.mkdir()
    config = json.loads((whisper / "config.json").read_text())
    weights = variables(load_file(whisper / "model.safetensors"), config["decoder_attention_heads"])
    (folder / "model.bin").write_bytes(pack(*stored(weights, form)))
    said = json.loads((whisper / "generation_config.json").read_text())
    names = {"suppress_tokens": "suppress_ids", "begin_suppress_tokens": "suppress_ids_begin"}
    (folder / "config.json").write_text(json.dumps({theirs: said[ours] for ours, theirs in names.items()}))
    for file in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(whisper / file, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    words = {**tokens["model"]["vocab"], **{each["content"]: each["id"] for each in tokens["added_tokens"]}}
    listed = sorted(words, key=words.__getitem__)
    (folder / "vocabulary.json").write_text(json.dumps(listed))
    return folder


OPENAI = (
    ("model.", ""),
    (".layers.", ".blocks."),
    (".self_attn_layer_norm.", ".attn_ln."),
    (".encoder_attn_layer_norm.", ".cross_attn_ln."),
    (".final_layer_norm.", ".mlp_ln."),
    (".self_attn.", ".attn."),
    (".encoder_attn.", ".cross_attn."),
    (".q_proj.", ".query."),
    (".k_proj.", ".key."),
    (".v_proj.", ".value."),
    (".out_proj.", ".out."),
    (".fc1.", ".mlp.0."),
    (".fc2.", ".mlp.2."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
    (".embed_tokens.", ".token_embedding."),
    (".embed_positions.weight", ".positional_embedding"),
)


def save_openai(file: Path, whisper: Path, **dims: object) -> Path:
    """OpenAI's .pt, without a tokenizer; `dims` in place of the true ones."""
    config = json.loads((whisper / "config.json").read_text())
    state = {}
    for name, weight in load_file(whisper / "model.safetensors").items():
        for ours, theirs in OPENAI:
            name = name.replace(ours, theirs)
        state[name] = weight
    sizes = {
        "n_mels": config["num_mel_bins"],
        "n_vocab": config["vocab_size"],
        "n_audio_ctx": config["max_source_positions"],
        "n_audio_state": config["d_model"],
        "n_audio_head": config["encoder_attention_heads"],
        "n_audio_layer": config["encoder_layers"],
        "n_text_ctx": config["max_target_positions"],
        "n_text_state": config["d_model"],
        "n_text_head": config["decoder_attention_heads"],
        "n_text_layer": config["decoder_layers"],
    }
    torch.save({"dims": {**sizes, **dims}, "model_state_dict": state}, file)
    return file


def to_pickle(whisper: Path, shards: int = 1, **more: Any) -> None:
    """pytorch_model.bin in place of safetensors, whole or in parts, the tied head among it as once usual."""
    state: dict[str, Any] = load_file(whisper / "model.safetensors")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    (whisper / "model.safetensors").unlink()
    names = sorted(state)
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        files = ["pytorch_model.bin"]
    else:
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (whisper / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        torch.save({name: state[name] for name in names[i::shards]} | more, whisper / file)
