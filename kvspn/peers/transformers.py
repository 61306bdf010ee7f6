"""Hugging Face transformers, eager: Whisper's own decoder module with its dynamic cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from kvspn.ops import DecoderWeights
from kvspn.ops.weights import Linear, Norm
from kvspn.peers import Problem, Step, timed

FORMATS = {"fp32": 4, "bf16": 2, "int8": 4}
ROWS = (1, 2)
LAUNCHES = None


class _Model(nn.Module):
    def __init__(self, weights: DecoderWeights, positions: int) -> None:
        super().__init__()
        vocabulary, width = weights.embed_tokens.shape
        config = WhisperConfig(
            vocab_size=vocabulary,
            d_model=width,
            decoder_layers=len(weights.layers),
            decoder_attention_heads=weights.heads,
            decoder_ffn_dim=len(weights.layers[0].fc1.weight),
            max_source_positions=positions,
            max_target_positions=len(weights.embed_positions),
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            attn_implementation="sdpa",
        )
        self.decoder = WhisperDecoder(config)
        self.head = nn.Linear(width, vocabulary, bias=False)


@torch.inference_mode()
def prepare(problem: Problem, fmt: str) -> Step:
    w = problem.weights
    with torch.device("meta"):
        model = _Model(w, len(problem.states)).eval()
    model.load_state_dict(dict(_state(w)), assign=True)
    dtype = torch.bfloat16 if fmt == "bf16" else torch.float32
    model.to(dtype)
    if fmt == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    own, cross = DynamicCache(), DynamicCache()
    for i in range(len(w.layers)):
        own.update(*problem.kv[i, :, None].to(dtype), i)
        cross.update(*problem.cross_kv[i, :, None].to(dtype), i)
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated = dict.fromkeys(range(len(w.layers)), True)
    states = problem.states[None].to(dtype)

    @torch.inference_mode()
    def step(rows: int) -> tuple[float, Tensor]:
        ids = torch.tensor([problem.newest[:rows]])

        def run() -> Tensor:
            out = model.decoder(ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
            logits: Tensor = model.head(out.last_hidden_state)[0]
            own.crop(-rows)
            return logits

        return timed(run)

    return step


def _state(w: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in _Model, none copied."""
    width = w.embed_tokens.shape[1]
    yield "head.weight", w.head.weight
    yield "decoder.embed_tokens.weight", w.embed_tokens
    yield "decoder.embed_positions.weight", w.embed_positions
    parts: dict[str, Norm | Linear] = {"layer_norm": w.norm}
    for i, layer in enumerate(w.layers):
        parts |= {
            f"layers.{i}.self_attn_layer_norm": layer.self_norm,
            f"layers.{i}.self_attn.out_proj": layer.self_out,
            f"layers.{i}.encoder_attn_layer_norm": layer.cross_norm,
            f"layers.{i}.encoder_attn.q_proj": layer.cross_q,
            f"layers.{i}.encoder_attn.out_proj": layer.cross_out,
            f"layers.{i}.final_layer_norm": layer.ffn_norm,
            f"layers.{i}.fc1": layer.fc1,
            f"layers.{i}.fc2": layer.fc2,
        }
        fused = {"self_attn.": ("qkv", layer.self_qkv), "encoder_attn.": ("kv", layer.cross_kv)}
        for attention, (names, linear) in fused.items():
            projections = zip(names, _split(linear, width), strict=True)
            parts |= {f"layers.{i}.{attention}{name}_proj": part for name, part in projections}
    for name, part in parts.items():
        yield f"decoder.{name}.weight", part.weight
        if part.bias is not None and not name.endswith("k_proj"):  # Whisper's keys have no bias
            yield f"decoder.{name}.bias", part.bias


def _split(linear: Linear, width: int) -> Iterator[Linear]:
    biases = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return map(Linear, linear.weight.split(width), biases.split(width))
