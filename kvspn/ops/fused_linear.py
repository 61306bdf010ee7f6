"""fused_linear: [LayerNorm ->] x @ weight.T + bias [-> GELU] [-> + residual] for a few rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.checks import FLOATS, Shapes, boolean, number, same_dtype
from kvspn.ops._library import register
from kvspn.weights.linear import check_weight, dequantise


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    shapes = Shapes()
    shapes.tensor("x", x, "... K", FLOATS)
    check_weight(shapes, "weight", "scale", weight, scale, "N", "K")
    if bias is not None:
        shapes.tensor("bias", bias, "N", FLOATS)
    check_norm(shapes, norm_weight, norm_bias, eps)
    boolean("gelu", gelu)
    if residual is not None:
        shapes.tensor("residual", residual, "... N", FLOATS)
        same_dtype("residual", residual, "x", x.dtype)
        if residual.shape[:-1] != x.shape[:-1]:
            expected = [*x.shape[:-1], shapes["N"]]
            raise ValueError(f"residual must have shape {expected}, got {list(residual.shape)}")


def check_norm(shapes: Shapes, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> None:
    """Check the optional LayerNorm over the dimension "K"."""
    if norm_weight is not None:
        shapes.tensor("norm_weight", norm_weight, "K", FLOATS)
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError("norm_bias must be None without norm_weight, got a tensor")
        shapes.tensor("norm_bias", norm_bias, "K", FLOATS)
    number("eps", eps)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """[LayerNorm ->] x @ weight.T + bias [-> GELU] [-> + residual], each row of x on its own.

    Args:
        x: [..., K], fp32, bf16 or fp16. Made for 1 to 16 rows; any number is right.
        weight: [N, K] in fp32, bf16 or fp16; or int8 or fp8 (float8_e4m3fn) with one scale per output
            channel; or int4 packed in uint8 [N, K/2], low nibble first, each nibble the value plus 8, with
            one scale per group.
        bias: [N] or None.
        norm_weight, norm_bias: [K], LayerNorm over x first; norm_bias may be left out.
        eps: of the LayerNorm.
        gelu: the exact GELU, with erf.
        residual: [..., N] in x's dtype, added last.
        scale: fp32; None, [N] for int8 and fp8, [N, groups] for int4, each group K/groups long.

    Returns:
        [..., N] in x's dtype. Everything is fp32 inside, LayerNorm's output too; one rounding at the end.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
    """
    matrix = dequantise(weight, scale)
    bias = None if bias is None else bias.float()
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape[0], matrix.shape[0], dtype=torch.float32, device=x.device)
    for r, row in enumerate(rows):
        y = project(row, matrix, bias, norm_weight, norm_bias, eps)
        out[r] = F.gelu(y) if gelu else y
    out = out.view(*x.shape[:-1], matrix.shape[0])
    return (out if residual is None else out + residual).to(x.dtype)


def project(
    row: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """One row [K] -> fp32 [N]. A fresh copy of the row: its place in memory must not show in the sums."""
    row = row.to(torch.float32, copy=True)
    if norm_weight is not None:
        shift = None if norm_bias is None else norm_bias.float()
        row = F.layer_norm(row, row.shape, norm_weight.float(), shift, eps)
    return F.linear(row, matrix, bias)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


fused_linear = register(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, float eps=1e-5, bool gelu=False, Tensor? residual=None, "
    "Tensor? scale=None) -> Tensor",
    check=check,
    fake=fake,
    reference=reference,
)
