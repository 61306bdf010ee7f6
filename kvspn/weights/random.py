"""Decoders with random weights, for benchmarks and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.weights import (
    WHISPER,
    Architecture,
    DecoderWeights,
    DraftBlockWeights,
    LayerWeights,
    Linear,
    Norm,
)
from kvspn.weights.linear import quantise_linear


def random_decoder(
    *,
    layers: int = 2,
    blocks: int = 1,
    groups: int = 0,
    heads: int = 2,
    head_dim: int = 8,
    draft_heads: int = 0,
    ffn: int = 32,
    vocabulary: int = 29,
    positions: int = 24,
    encoder_attention: bool = True,
    last_layer_only: bool = False,
    encoder_stride: int = 1,
    short_list: int = 0,
    quantised: str | None = None,
    gain: float = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    architecture: Architecture = WHISPER,
) -> DecoderWeights:
    """A decoder of any shape. A larger ``gain`` makes the logits depend more on the context.

    quantised: "int8", "fp8" or "int4" layers and blocks; ``dtype`` stays that of embeddings, head and norms.
    """
    generator = torch.Generator().manual_seed(seed)
    d = heads * head_dim
    draft_d = (draft_heads or heads) * head_dim
    key_d = (architecture.key_heads or heads) * head_dim
    cross, encoder_attention = architecture.cross, encoder_attention and architecture.cross
    fc1 = 2 * ffn if architecture.gated else ffn

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def norm() -> Norm:
        weight = 1 + rand(d, scale=0.1)
        return Norm(weight) if architecture.rms_norm else Norm(weight, rand(d, scale=0.1))

    def linear(n: int, k: int, zero_bias: slice | None = None) -> Linear:
        bias = rand(n, scale=0.1)
        if zero_bias is not None:
            bias[zero_bias] = 0
        made = Linear(rand(n, k, scale=gain * k**-0.5), bias)
        return quantise_linear(made, quantised) if quantised else made

    def layer() -> LayerWeights:
        return LayerWeights(
            self_norm=norm(),
            self_qkv=linear(d + 2 * key_d, d, slice(d, d + key_d)),
            self_out=linear(d, d),
            cross_norm=norm() if cross else None,
            cross_q=linear(d, d) if cross else None,
            cross_kv=linear(2 * d, d, slice(0, d)) if cross else None,
            cross_out=linear(d, d) if cross else None,
            ffn_norm=norm(),
            fc1=linear(fc1, d),
            fc2=linear(d, ffn),
        )

    def block() -> DraftBlockWeights:
        return DraftBlockWeights(
            kv_norm=norm(),
            kv_q=linear(draft_d, d),
            kv_out=linear(d, draft_d),
            ffn_norm=norm(),
            fc1=linear(fc1, d),
            fc2=linear(d, ffn),
            cross_norm=norm() if encoder_attention else None,
            cross_q=linear(draft_d, d) if encoder_attention else None,
            cross_out=linear(d, draft_d) if encoder_attention else None,
        )

    embed_tokens = rand(vocabulary, d)
    draft_ids = torch.randperm(vocabulary, generator=generator)[:short_list].sort().values.int()
    return DecoderWeights(
        heads=heads,
        embed_tokens=embed_tokens,
        embed_positions=None if architecture.rotary_base else rand(positions, d),
        layers=tuple(layer() for _ in range(layers)),
        norm=norm(),
        head=Linear(embed_tokens),
        blocks=tuple(block() for _ in range(blocks)),
        draft_norm=norm() if blocks else None,
        draft_head=Linear(embed_tokens[draft_ids]) if short_list else None,
        draft_ids=draft_ids if short_list else None,
        groups=groups,
        last_layer_only=last_layer_only,
        encoder_stride=encoder_stride,
        architecture=architecture,
    )
