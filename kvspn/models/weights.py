"""A model's decoder and draft network as the named tensors that every engine takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvspn.weights import DecoderWeights, DraftBlockWeights, LayerWeights, Linear, Norm

if TYPE_CHECKING:
    from kvspn.models.kvspn_network import CrossModelAttention, KVSPNBlock
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration


def decoder_weights(model: WhisperM2MForConditionalGeneration) -> DecoderWeights:
    """Shares the model's storage but for the projections that are fused (q, k, v)."""
    decoder, draft = model.model.decoder, model.kvspn
    embed = decoder.embed_tokens.weight
    ids = None if draft is None else draft.draft_ids
    with torch.no_grad():
        return DecoderWeights(
            heads=model.config.decoder_attention_heads,
            embed_tokens=embed.detach() * decoder.embed_scale if decoder.embed_scale != 1 else embed.detach(),
            embed_positions=decoder.embed_positions.weight.detach(),
            layers=tuple(_layer(layer) for layer in decoder.layers),
            norm=_norm(decoder.layer_norm),
            head=Linear(model.proj_out.weight.detach()),
            blocks=() if draft is None else tuple(_block(block) for block in draft.blocks),
            groups=0 if draft is None else draft.groups,
            draft_norm=None if draft is None else _norm(draft.layer_norm),
            draft_head=None if ids is None else Linear(draft.head_weight(model.proj_out.weight).detach()),
            draft_ids=None if ids is None else ids.to(torch.int32),
            last_layer_only=draft is not None and draft.last_layer_only,
            encoder_stride=1 if draft is None else draft.encoder_stride,
        )


def encoder_weights(model: WhisperM2MForConditionalGeneration) -> dict[str, Tensor]:
    """The speech encoder by name: "encoder.conv1.weight", "encoder.layers.0.self_qkv.bias", ..., in fp32."""
    encoder = model.model.encoder
    parts: dict[str, Norm | Linear] = {
        "conv1": _linear(encoder.conv1),
        "conv2": _linear(encoder.conv2),
        "norm": _norm(encoder.layer_norm),
    }
    for i, layer in enumerate(encoder.layers):
        attention = layer.self_attn
        parts |= {
            f"layers.{i}.self_norm": _norm(layer.self_attn_layer_norm),
            f"layers.{i}.self_qkv": _stack(attention.q_proj, attention.k_proj, attention.v_proj),
            f"layers.{i}.self_out": _linear(attention.out_proj),
            f"layers.{i}.ffn_norm": _norm(layer.final_layer_norm),
            f"layers.{i}.fc1": _linear(layer.fc1),
            f"layers.{i}.fc2": _linear(layer.fc2),
        }
    tensors = {f"encoder.{name}.weight": part.weight.float() for name, part in parts.items()}
    tensors |= {f"encoder.{name}.bias": part.bias.float() for name, part in parts.items()}
    return tensors | {"encoder.embed_positions": encoder.embed_positions.weight.detach().float()}


def _layer(layer: nn.Module) -> LayerWeights:
    return LayerWeights(
        self_norm=_norm(layer.self_attn_layer_norm),
        self_qkv=_stack(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        self_out=_linear(layer.self_attn.out_proj),
        cross_norm=_norm(layer.encoder_attn_layer_norm),
        cross_q=_linear(layer.encoder_attn.q_proj),
        cross_kv=_stack(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj),
        cross_out=_linear(layer.encoder_attn.out_proj),
        ffn_norm=_norm(layer.final_layer_norm),
        fc1=_linear(layer.fc1),
        fc2=_linear(layer.fc2),
    )


def _block(block: KVSPNBlock) -> DraftBlockWeights:
    cross: CrossModelAttention | None = getattr(block, "encoder_attn", None)
    return DraftBlockWeights(
        kv_norm=_norm(block.attn_layer_norm),
        kv_q=_linear(block.attn.q_proj),
        kv_out=_linear(block.attn.out_proj),
        ffn_norm=_norm(block.final_layer_norm),
        fc1=_linear(block.fc1),
        fc2=_linear(block.fc2),
        cross_norm=None if cross is None else _norm(block.encoder_attn_layer_norm),
        cross_q=None if cross is None else _linear(cross.q_proj),
        cross_out=None if cross is None else _linear(cross.out_proj),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach())


def _linear(linear: nn.Linear) -> Linear:
    return Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _stack(*linears: nn.Linear) -> Linear:
    """Along the output; zeros stand in for a missing bias (Whisper's k)."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return Linear(weight, torch.cat(biases))
