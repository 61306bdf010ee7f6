"""A decoder's weights in another format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvspn.weights import Architecture, DecoderWeights, Linear
from kvspn.weights.linear import FORMATS, dequantise, quantise_linear

__all__ = ["FORMATS", "base_and_draft", "dequantised", "quantise", "round_to_int8"]


def base_and_draft(name: str) -> tuple[str, str]:
    """ "int8" -> ("int8", "int8"), the base model's and the draft network's; "int8/int4" -> ("int8", "int4").

    Raises:
        ValueError: not of FORMATS.
    """
    base, slash, draft = name.partition("/")
    for part in (base, draft) if slash else (base,):
        if part not in FORMATS:
            raise ValueError(
                f"weights must be one of {', '.join(FORMATS)}, or two as base/draft, got {name!r}"
            )
    return base, draft or base


def quantise(weights: DecoderWeights, to: str) -> DecoderWeights:
    """The same decoder with its weights in another format; embeddings, and with them the cache, follow.

    int8 and fp8 (e4m3) stand for the matrices, symmetric, each output channel with its own scale. int4 is
    symmetric with a scale for each 64 inputs of an output; the output embedding that both networks share is
    int8 then. Embeddings and norms are bf16 beside these three, biases fp32.

    Args:
        weights: in fp32, bf16 or fp16.
        to: one of FORMATS, or two: "int8/int4" has the draft network's matrices in int4, an output embedding
            of its own among them. A draft network may be as coarse as it likes: that changes speed, never
            the output at k = 1.

    Raises:
        ValueError: another format; weights that have scales already.
    """
    base, draft = base_and_draft(to)
    float_dtype = FORMATS[FORMATS[base].floats].dtype

    def convert(part: Any, to: str) -> Any:
        """A tensor, a Norm, a Linear, or a tuple of such."""
        if part is None or isinstance(part, int | Architecture):
            return part
        if isinstance(part, Tensor):
            return part.to(float_dtype) if part.is_floating_point() else part
        if isinstance(part, Linear):
            if part.scale is not None:
                raise ValueError(
                    f"weights must be fp32, bf16 or fp16 to be converted, got {part.weight.dtype}"
                )
            if FORMATS[to].quantise is not None:
                return quantise_linear(part, to)
            dtype = FORMATS[to].dtype
            return Linear(part.weight.to(dtype), None if part.bias is None else part.bias.to(dtype))
        converted = (convert(each, to) for each in part)
        return type(part)(*converted) if hasattr(part, "_fields") else tuple(converted)

    fields = {name: convert(value, base) for name, value in vars(weights).items()}
    head = weights.head
    if (other := FORMATS[base].head) is not None:
        fields["head"] = convert(head, other)
    elif FORMATS[base].quantise is None and head.weight.data_ptr() == weights.embed_tokens.data_ptr():
        fields["head"] = Linear(fields["embed_tokens"])  # still tied
    if draft != base and weights.blocks:
        fields["blocks"] = convert(weights.blocks, draft)
        fields["draft_head"] = convert(weights.draft_output, draft)
    return DecoderWeights(**fields)


def dequantised(weights: DecoderWeights) -> DecoderWeights:
    """The same decoder in fp32: the values that weights of any format stand for."""

    def convert(part: Any) -> Any:
        if part is None or isinstance(part, int | Architecture):
            return part
        if isinstance(part, Tensor):
            return part.float() if part.is_floating_point() else part
        if isinstance(part, Linear):
            bias = None if part.bias is None else part.bias.float()
            return Linear(dequantise(part.weight, part.scale), bias)
        converted = map(convert, part)
        return type(part)(*converted) if hasattr(part, "_fields") else tuple(converted)

    return DecoderWeights(**{name: convert(value) for name, value in vars(weights).items()})


@torch.no_grad()
def round_to_int8(decoder: Any) -> list[nn.Parameter]:
    """A decoder's matrices in place to the values that int8 weights stand for, which then cost no more.

    Args:
        decoder: Whisper's or one like it: `embed_tokens` and the linear layers of `layers`.

    Returns: the matrices.
    """
    linear = [part for part in decoder.layers.modules() if isinstance(part, nn.Linear)]
    matrices = [part.weight for part in (decoder.embed_tokens, *linear)]
    for matrix in matrices:
        weight, _, scale = quantise_linear(Linear(matrix), "int8")
        matrix.copy_(dequantise(weight, scale))
    return matrices
