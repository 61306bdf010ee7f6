"""A model's decoder and draft network as the named tensors that every engine takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperDecoderLayer,
    WhisperEncoderLayer,
    WhisperPositionalEmbedding,
)

from kvspn.weights import DecoderWeights, DraftBlockWeights, LayerWeights, Linear, Norm

if TYPE_CHECKING:
    from kvspn.models.kvspn_network import CrossModelAttention, KVSPNBlock
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration


_PLAIN = {  # what the engines compute by themselves; this package's own modules are known too
    kind.forward
    for kind in (
        nn.Conv1d,
        nn.Embedding,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleList,
        WhisperAttention,
        WhisperDecoderLayer,
        WhisperEncoderLayer,
        WhisperPositionalEmbedding,
        type(ACT2FN["gelu"]),
    )
}
LAYER_NORM_EPS = 1e-5
_NO_CHANGE = "make_inputs_require_grads"  # transformers' hook for gradient checkpointing returns nothing


def packed_parts(model: WhisperM2MForConditionalGeneration) -> dict[str, nn.Module]:
    """The modules, by name, whose weights `decoder_weights` takes."""
    parts: dict[str, nn.Module] = {"model.decoder": model.model.decoder, "proj_out": model.proj_out}
    return parts if model.kvspn is None else parts | {"kvspn": model.kvspn}


def check_plain(parts: Mapping[str, nn.Module]) -> None:
    """Checks that engines, which take weights alone, compute what the modules' `forward` does.

    Raises:
        TypeError: naming a module with forward hooks, another `forward` (a quantised layer) or weights of
            another kind. PEFT's adapters are no fault: their active ones are merged.
    """
    for name, module in parts.items():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(_NO_CHANGE not in str(hook) for hook in hooks):
            raise TypeError(f"{name} must have no forward hooks to be packed into an engine, got some")
        base = _base_layer(module)
        if base is not module:
            check_plain({f"{name}.base_layer": base})
            continue
        kind = type(module)
        tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
        if (kind.forward not in _PLAIN and not kind.__module__.startswith("kvspn.models.")) or any(
            type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors
        ):
            kinds = ", ".join(dict.fromkeys(type(tensor).__name__ for tensor in tensors))
            raise TypeError(
                f"{name} must be a plain layer to be packed into an engine, got {kind.__name__} ({kinds})"
            )
        if isinstance(module, nn.LayerNorm) and (module.eps != LAYER_NORM_EPS or len(tensors) != 2):
            raise TypeError(
                f"{name} must have eps {LAYER_NORM_EPS}, a weight and a bias to be packed into an engine, "
                f"got {module}"
            )
        check_plain({f"{name}.{child}": part for child, part in module.named_children()})


def decoder_weights(model: WhisperM2MForConditionalGeneration) -> DecoderWeights:
    """Shares the model's storage but for what is fused (q, k, v) and what has adapters, which are merged.

    Raises:
        TypeError: see `check_plain`.
    """
    check_plain(packed_parts(model))
    decoder, draft = model.model.decoder, model.kvspn
    ids = None if draft is None else draft.draft_ids
    with torch.no_grad():
        embed, head = (merged(part).weight.detach() for part in (decoder.embed_tokens, model.proj_out))
        return DecoderWeights(
            heads=model.config.decoder_attention_heads,
            embed_tokens=embed * decoder.embed_scale if decoder.embed_scale != 1 else embed,
            embed_positions=merged(decoder.embed_positions).weight.detach(),
            layers=tuple(_layer(layer) for layer in decoder.layers),
            norm=_norm(decoder.layer_norm),
            head=Linear(head),
            blocks=() if draft is None else tuple(_block(block) for block in draft.blocks),
            groups=0 if draft is None else draft.groups,
            draft_norm=None if draft is None else _norm(draft.layer_norm),
            draft_head=None if ids is None else Linear(draft.head_weight(head)),
            draft_ids=None if ids is None else ids.to(torch.int32),
            last_layer_only=draft is not None and draft.last_layer_only,
            encoder_stride=1 if draft is None else draft.encoder_stride,
        )


def encoder_weights(model: WhisperM2MForConditionalGeneration) -> dict[str, Tensor]:
    """The speech encoder by name: "encoder.conv1.weight", "encoder.layers.0.self_qkv.bias", ..., in fp32."""
    encoder = model.model.encoder
    check_plain({"model.encoder": encoder})
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
    return tensors | {"encoder.embed_positions": merged(encoder.embed_positions).weight.detach().float()}


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


def _base_layer(module: Any) -> nn.Module:
    """What PEFT has wrapped, or the module itself."""
    if hasattr(module, "modules_to_save"):  # a copy of the whole module, trained in its place
        chosen = [] if module.disable_adapters else module.active_adapters
        return module.modules_to_save[chosen[0]] if chosen else module.original_module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def merged(layer: Any) -> Any:
    """The layer with its active adapters merged: by PEFT's own merge, on a copy."""
    if hasattr(layer, "get_base_layer"):
        layer = copy.deepcopy(layer)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
    return _base_layer(layer)


def _norm(norm: nn.LayerNorm) -> Norm:
    norm = merged(norm)
    return Norm(norm.weight.detach(), norm.bias.detach())


def _linear(linear: nn.Linear) -> Linear:
    linear = merged(linear)
    return Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _stack(*linears: nn.Linear) -> Linear:
    """Along the output; zeros stand in for a missing bias (Whisper's k)."""
    parts = list(map(_linear, linears))
    biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases))
