"""Which language is spoken: the model's own probabilities after the start token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from kvspn.models.weights import merged

if TYPE_CHECKING:
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration


def language_probabilities(
    model: WhisperM2MForConditionalGeneration, states: Tensor, start: int, tokens: Sequence[int]
) -> Tensor:
    """fp32 [n]: how likely each of the language tokens follows the start token alone, their sum 1.

    One position through the decoder. The encoder's keys and values are not computed, which would cost more
    than all the rest: scores are q·(W·s) = (Wᵀ·q)·s, and a weighted sum of values is W times that of states.

    Args:
        states: [E, d] of one row.
        tokens: [n] language tokens.
    """
    decoder = model.model.decoder
    embedding = merged(decoder.embed_tokens).weight
    x = embedding[start] * decoder.embed_scale + merged(decoder.embed_positions).weight[0]
    for layer in decoder.layers:
        own = layer.self_attn  # of a single position, which is all weight on its own value
        x = x + own.out_proj(own.v_proj(layer.self_attn_layer_norm(x)))
        x = x + _attend(layer.encoder_attn, layer.encoder_attn_layer_norm(x), states)
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    head = merged(model.proj_out).weight[list(tokens)]
    return (head @ decoder.layer_norm(x)).float().softmax(0)


def _attend(attention: Any, x: Tensor, states: Tensor) -> Tensor:
    """Cross-attention of one query x [d] over the states [E, d] -> [d]."""
    heads = attention.num_heads
    keys, values = merged(attention.k_proj), merged(attention.v_proj)
    q = (attention.q_proj(x) * attention.scaling).view(heads, 1, -1)
    # A bias of the keys would add the same to every score.
    queries = (q @ keys.weight.view(heads, -1, states.shape[1])).squeeze(1)
    weights = (queries @ states.mT).float().softmax(-1).to(states.dtype)
    mixed = (weights @ states).view(heads, -1, 1)
    out = (values.weight.view(heads, -1, states.shape[1]) @ mixed).flatten()
    return attention.out_proj(out if values.bias is None else out + values.bias)
