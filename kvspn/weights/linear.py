"""A matrix in any weight format, with its bias and scales: checked, quantised, and made fp32 again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvspn.checks import FLOATS, FP32, Shapes

GROUP = 64  # columns that share a scale in int4


class Linear(NamedTuple):
    """x @ weight.T + bias in any weight format of :func:`kvspn.ops.fused_linear`.

    weight [N, K] (int4: [N, K/2]); bias [N] or None; scale None, [N] (int8) or [N, groups] (int4).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def check_weight(
    shapes: Shapes, weight_name: str, scale_name: str, weight: Tensor, scale: Tensor | None, n: str, k: str
) -> None:
    """Check a weight [n, k] in any format; the letter ``k`` must be bound already."""
    if isinstance(weight, Tensor) and weight.dtype == torch.uint8:
        shapes.sizes[f"{k}/2"] = shapes[k] // 2
        shapes.tensor(weight_name, weight, f"{n} {k}/2", (torch.uint8,))
        shapes.tensor(scale_name, scale, f"{n} ?", FP32)
        if scale is not None and (shapes[k] % 2 or not scale.shape[1] or shapes[k] % scale.shape[1]):
            raise ValueError(
                f"{scale_name} must divide {k}={shapes[k]} (even) into groups, got {scale.shape[1]}"
            )
        return
    shapes.tensor(weight_name, weight, f"{n} {k}", (*FLOATS, torch.int8, torch.uint8))
    if weight.dtype == torch.int8:
        shapes.tensor(scale_name, scale, n, FP32)
    elif scale is not None:
        raise ValueError(f"{scale_name} must be None unless {weight_name} is int8 or uint8, got a tensor")


def dequantise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight in any format -> fp32 [N, K]."""
    if scale is None:
        return weight.float()
    if weight.dtype == torch.int8:
        return weight * scale[:, None]
    nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).float() - 8
    return (nibbles.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def quantise_linear(linear: Linear, to: str) -> Linear:
    """One matrix [N, K] in "int8" or "int4", nearest values.

    int8: scale [N] = max / 127. int4: groups of 64 inputs, or of 32, 16, 8 or 2 where that does not divide K;
    scale [N, K / group], such that a group's largest value becomes -8. The bias becomes fp32.

    Raises:
        ValueError: an odd K in int4.
    """
    matrix = linear.weight.float()
    bias = None if linear.bias is None else linear.bias.float()
    tiny = torch.finfo(torch.float32).tiny
    if to == "int8":
        scale = (matrix.abs().amax(dim=1) / 127).clamp_(min=tiny)
        return Linear((matrix / scale[:, None]).round_().to(torch.int8), bias, scale)
    columns = matrix.shape[1]
    if columns % 2:
        raise ValueError(f"weight must have an even number of columns in int4, got {columns}")
    size = next(size for size in (GROUP, 32, 16, 8, 2) if columns % size == 0)
    groups = matrix.unflatten(1, (-1, size))
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = extreme / -8
    scale[scale == 0] = tiny
    nibbles = ((groups / scale).round_().clamp_(-8, 7) + 8).to(torch.uint8).flatten(1)
    return Linear(nibbles[:, ::2] | nibbles[:, 1::2] << 4, bias, scale.squeeze(2))
