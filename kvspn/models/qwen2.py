"""The decoder of a Qwen2 (arXiv 2407.10671), transformers' ``Qwen2ForCausalLM``, as an engine takes it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import Qwen2ForCausalLM

from kvspn.models.weights import check_plain
from kvspn.weights import QWEN2, DecoderWeights, LayerWeights, Linear, Norm


def qwen2_weights(model: Qwen2ForCausalLM) -> DecoderWeights:
    """Shares the model's storage but for what is fused: queries, keys and values; gate and up.

    An engine on them has no encoder: ``cross_capacity=0``, and ``decode(engine, None, prompts, ...)``.

    Raises:
        ValueError: naming the setting of the config that is not what Qwen2 models have.
        TypeError: a part of the model that is no plain layer, such as an adapter.
    """
    config = model.config
    rope = config.rope_parameters
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    for name, given, must in (
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_type", rope["rope_type"], "default"),
        ("use_sliding_window", bool(config.use_sliding_window), False),
        ("head_dim", getattr(config, "head_dim", None) or width, width),
    ):
        if given != must:
            raise ValueError(f"{name} must be {must}, got {given}")
    plain = {f"layers.{i}.{name}": part for i in range(layers) for name, part in _linears(model, i).items()}
    check_plain(plain)
    with torch.no_grad():
        return DecoderWeights(
            heads=heads,
            embed_tokens=model.model.embed_tokens.weight.detach(),
            embed_positions=None,
            layers=tuple(_layer(model, i) for i in range(layers)),
            norm=Norm(model.model.norm.weight.detach()),
            head=Linear(model.lm_head.weight.detach()),
            architecture=replace(
                QWEN2,
                key_heads=config.num_key_value_heads,
                norm_eps=config.rms_norm_eps,
                rotary_base=float(rope["rope_theta"]),
            ),
        )


def _linears(model: Qwen2ForCausalLM, layer: int) -> dict[str, nn.Module]:
    """Its matrices by name."""
    parts = model.model.layers[layer].named_modules()
    return {name: part for name, part in parts if name.endswith("_proj")}


def _layer(model: Qwen2ForCausalLM, i: int) -> LayerWeights:
    layer, linears = model.model.layers[i], _linears(model, i)
    return LayerWeights(
        self_norm=Norm(layer.input_layernorm.weight.detach()),
        self_qkv=_stack(*(linears[f"self_attn.{name}_proj"] for name in "qkv")),
        self_out=_stack(linears["self_attn.o_proj"]),
        cross_norm=None,
        cross_q=None,
        cross_kv=None,
        cross_out=None,
        ffn_norm=Norm(layer.post_attention_layernorm.weight.detach()),
        fc1=_stack(linears["mlp.gate_proj"], linears["mlp.up_proj"]),
        fc2=_stack(linears["mlp.down_proj"]),
    )


def _stack(*parts: nn.Module) -> Linear:
    """Several matrices of one input as one; of one, its own."""
    weights = [part.get_parameter("weight").detach() for part in parts]
    biases = [None if part.bias is None else part.get_parameter("bias").detach() for part in parts]
    if len(parts) == 1:
        return Linear(weights[0], biases[0])
    given = [bias for bias in biases if bias is not None]
    return Linear(torch.cat(weights), torch.cat(given) if given else None)
