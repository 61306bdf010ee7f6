"""Hugging Face transformers: Whisper's own decoder module, eager and, for GPUs, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from kvspn.measure.peers import Problem, Step, timed
from kvspn.weights import DecoderWeights, Linear, Norm

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
            encoder_layers=len(weights.layers),  # what StaticCache takes for the decoder's
            decoder_attention_heads=weights.heads,
            decoder_ffn_dim=len(weights.layers[0].fc1.weight),
            max_source_positions=positions,
            max_target_positions=weights.positions,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            attn_implementation="sdpa",
        )
        self.decoder = WhisperDecoder(config)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, states: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """[1, Q], [1, E, d] -> logits [1, Q, V]."""
        out = self.decoder(ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        logits: Tensor = self.head(out.last_hidden_state)
        return logits


class Runner(NamedTuple):
    """run() -> logits [rows, V]; reset() goes before each, and takes back what the last one added."""

    run: Callable[[], Tensor]
    reset: Callable[[], object]


def prepare(problem: Problem, fmt: str) -> Step:
    runner = eager(problem, fmt)
    return lambda rows: timed(*runner(rows))


@torch.inference_mode()
def eager(problem: Problem, fmt: str) -> Callable[[int], Runner]:
    """By query rows: the module as it is, with a DynamicCache."""
    model, states = _build(problem, fmt)
    own = DynamicCache()
    cache = _filled(problem, own, DynamicCache(), states.dtype)
    length = len(problem.prompt)

    def runner(rows: int) -> Runner:
        ids = torch.tensor([problem.newest[:rows]], device=problem.device)

        @torch.inference_mode()
        def run() -> Tensor:
            logits: Tensor = model(ids, states, cache)[0]
            return logits

        return Runner(run, lambda: own.crop(length - own.get_seq_length()))

    return runner


@torch.no_grad()
def static(problem: Problem, fmt: str) -> Callable[[int], Runner]:
    """By query rows: compiled with mode="reduce-overhead", a CUDA graph on a GPU, with a StaticCache.

    The next run overwrites the logits.
    """
    model, states = _build(problem, fmt)
    length = len(problem.prompt)
    config = model.decoder.config
    own = StaticCache(config=config, max_cache_len=length + max(ROWS))
    cross = StaticCache(config=config, max_cache_len=len(problem.states))  # its addresses stay: no copies
    cache = _filled(problem, own, cross, states.dtype)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def runner(rows: int) -> Runner:
        ids = torch.tensor([problem.newest[:rows]], device=problem.device)

        @torch.no_grad()
        def run() -> Tensor:
            logits: Tensor = compiled(ids, states, cache)[0]
            return logits

        def reset() -> None:
            for layer in own.layers:
                layer.cumulative_length.fill_(length)

        return Runner(run, reset)

    return runner


def _build(problem: Problem, fmt: str) -> tuple[_Model, Tensor]:
    """The module in a weight format, and the encoder's states [1, E, d] as it takes them."""
    w = problem.weights
    with torch.device("meta"):
        model = _Model(w, len(problem.states)).eval()
    model.load_state_dict(dict(_state(w)), assign=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(fmt, torch.float32)
    model.to(dtype)
    if fmt == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return model, problem.states[None].to(dtype)


def _filled(problem: Problem, own: Cache, cross: Cache, dtype: torch.dtype) -> EncoderDecoderCache:
    """The problem's keys and values in two empty caches."""
    layers = range(len(problem.kv))
    for i in layers:
        own.update(*problem.kv[i, :, None].to(dtype), i)
        cross.update(*problem.cross_kv[i, :, None].to(dtype), i)
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated = dict.fromkeys(layers, True)
    return cache


def _state(w: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in _Model, none copied."""
    width = w.embed_tokens.shape[1]
    yield "head.weight", w.head.weight
    yield "decoder.embed_tokens.weight", w.embed_tokens
    yield "decoder.embed_positions.weight", w.position_rows
    parts: dict[str, Norm | Linear] = {"layer_norm": w.norm}
    for i, layer in enumerate(w.layers):
        cross_norm, cross_q, cross_kv, cross_out = layer.cross
        parts |= {
            f"layers.{i}.self_attn_layer_norm": layer.self_norm,
            f"layers.{i}.self_attn.out_proj": layer.self_out,
            f"layers.{i}.encoder_attn_layer_norm": cross_norm,
            f"layers.{i}.encoder_attn.q_proj": cross_q,
            f"layers.{i}.encoder_attn.out_proj": cross_out,
            f"layers.{i}.final_layer_norm": layer.ffn_norm,
            f"layers.{i}.fc1": layer.fc1,
            f"layers.{i}.fc2": layer.fc2,
        }
        fused = {"self_attn.": ("qkv", layer.self_qkv), "encoder_attn.": ("kv", cross_kv)}
        for attention, (names, linear) in fused.items():
            projections = zip(names, _split(linear, width), strict=True)
            parts |= {f"layers.{i}.{attention}{name}_proj": part for name, part in projections}
    for name, part in parts.items():
        yield f"decoder.{name}.weight", part.weight
        if part.bias is not None and not name.endswith("k_proj"):  # Whisper's keys have no bias
            yield f"decoder.{name}.bias", part.bias


def _split(linear: Linear, width: int) -> Iterator[Linear]:
    biases = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return map(Linear, linear.weight.split(width), biases.split(width))
