"""A decoder's weights in another format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvspn.ops import DecoderWeights
from kvspn.ops.weights import Linear

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def quantise(weights: DecoderWeights, to: str) -> DecoderWeights:
    """The same decoder with its weights in one of FORMATS; embeddings, and with them the cache, follow.

    int8 stands for the matrices, symmetric, each output channel with its own scale (max / 127); embeddings,
    biases and norms are then bf16.

    Raises:
        ValueError: another format; weights that are int8 or int4 already.
    """
    if to not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {to!r}")
    float_dtype = torch.bfloat16 if to == "int8" else FORMATS[to]
    head = weights.head

    def convert(part: Any) -> Any:
        """A tensor, a Norm, a Linear, or a tuple of such."""
        if part is None or isinstance(part, int):
            return part
        if isinstance(part, Tensor):
            return part.to(float_dtype) if part.is_floating_point() else part
        if isinstance(part, Linear):
            if part.scale is not None:
                raise ValueError(
                    f"weights must be fp32, bf16 or fp16 to be converted, got {part.weight.dtype}"
                )
            if to == "int8":
                return _int8(part)
        converted = (convert(each) for each in part)
        return type(part)(*converted) if hasattr(part, "_fields") else tuple(converted)

    fields = {name: convert(value) for name, value in vars(weights).items()}
    if to != "int8" and head.weight.data_ptr() == weights.embed_tokens.data_ptr():
        fields["head"] = Linear(fields["embed_tokens"])  # still tied
    return DecoderWeights(**fields)


def _int8(linear: Linear) -> Linear:
    matrix = linear.weight.float()
    scale = (matrix.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    quantised = (matrix / scale[:, None]).round_().to(torch.int8)
    bias = None if linear.bias is None else linear.bias.float()
    return Linear(quantised, bias, scale)
