"""A matrix in any weight format, with its bias and scales: checked, quantised, and made fp32 again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvspn.checks import FLOATS, FP32, Shapes

GROUP = 64  # columns that share a scale in int4


class Linear(NamedTuple):
    """x @ weight.T + bias in any weight format of :func:`kvspn.ops.fused_linear`.

    weight [N, K] (int4: [N, K/2]); bias [N] or None; scale None, [N] (int8, fp8) or [N, groups] (int4).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class Format(NamedTuple):
    """How a decoder's matrices are stored.

    dtype: of the tensor. bits: of a weight.
    floats: the format of what is no matrix, embeddings, norms and biases, and with them of the cache.
    error: what rounding explains of a matrix's relative error (Frobenius).
    quantise: an fp32 matrix [N, K] -> weights and fp32 scales; None where weights have no scales.
    head: that of the output embedding which both networks share, where it is another.
    """

    dtype: torch.dtype
    bits: int
    floats: str
    error: float
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    head: str | None = None


_TINY = torch.finfo(torch.float32).tiny


def _scaled(matrix: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """A matrix whose outputs' largest values are `largest`, and the scales [N] that undo it."""
    scale = (matrix.abs().amax(dim=1) / largest).clamp_(min=_TINY)
    return matrix / scale[:, None], scale


def _to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = _scaled(matrix, 127)
    return values.round_().to(torch.int8), scale


def _to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = _scaled(matrix, 448)
    return values.to(torch.float8_e4m3fn), scale


def _to_int4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of 64 inputs, or of 32, 16, 8 or 2 where that does not divide K; their largest becomes -8."""
    columns = matrix.shape[1]
    if columns % 2:
        raise ValueError(f"weight must have an even number of columns in int4, got {columns}")
    size = next(size for size in (GROUP, 32, 16, 8, 2) if columns % size == 0)
    groups = matrix.unflatten(1, (-1, size))
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = extreme / -8
    scale[scale == 0] = _TINY
    nibbles = ((groups / scale).round_().clamp_(-8, 7) + 8).to(torch.uint8).flatten(1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale.squeeze(2)


FORMATS = {
    "fp32": Format(torch.float32, 32, "fp32", 0.0),
    "bf16": Format(torch.bfloat16, 16, "bf16", 2**-8),
    "fp16": Format(torch.float16, 16, "fp16", 2**-11),
    "fp8": Format(torch.float8_e4m3fn, 8, "bf16", 0.04, _to_fp8),
    "int8": Format(torch.int8, 8, "bf16", 0.03, _to_int8),
    "int4": Format(torch.uint8, 4, "bf16", 0.2, _to_int4, head="int8"),
}

_DTYPES = tuple(fmt.dtype for fmt in FORMATS.values())


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
    shapes.tensor(weight_name, weight, f"{n} {k}", _DTYPES)
    if weight.dtype not in FLOATS:
        shapes.tensor(scale_name, scale, n, FP32)
    elif scale is not None:
        raise ValueError(f"{scale_name} must be None beside a float {weight_name}, got a tensor")


def dequantise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight in any format -> fp32 [N, K]."""
    if scale is None:
        return weight.float()
    if weight.dtype != torch.uint8:
        return weight.float() * scale[:, None]
    nibbles = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).float() - 8
    return (nibbles.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def quantise_linear(linear: Linear, to: str) -> Linear:
    """One matrix [N, K] in one of FORMATS with scales, nearest values. The bias becomes fp32.

    int8, fp8: scale [N], an output's largest value becomes 127 or 448. int4: scale [N, K / group], of groups
    of 64 inputs, or of 32, 16, 8 or 2 where that does not divide K; a group's largest value becomes -8.

    Raises:
        ValueError: an odd K in int4.
    """
    make = FORMATS[to].quantise
    assert make is not None
    weight, scale = make(linear.weight.float())
    return Linear(weight, None if linear.bias is None else linear.bias.float(), scale)
