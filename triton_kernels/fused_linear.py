"""fused_linear: one program per 16 rows and BLOCK_N outputs; the matrix is read once for up to 16 rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvspn.triton_kernels.configurations import ROWS, matrix
from kvspn.triton_kernels.launch import launch, register, result
from kvspn.triton_kernels.projection import project


@triton.jit(do_not_specialize=["rows"])
def fused_linear_kernel(
    x, weight, out, bias, norm_weight, norm_bias, residual, scale,
    rows, n, eps, x_stride, weight_stride, residual_stride, scale_stride, group,
    K: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, n, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + column, mask=column < n, other=0).to(tl.float32)[None, :]
    if GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    inside = (row < rows)[:, None] & (column < n)[None, :]
    wide = row.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual + wide * residual_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(out + wide * n + column[None, :], y, mask=inside)


def launch_fused_linear(
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
    """As :func:`kvspn.ops.fused_linear`, unchecked."""
    n, k = weight.shape[0], x.shape[-1]
    flat = x.reshape(-1, k)
    out = result(x, len(flat), n)
    added = None if residual is None else residual.reshape(-1, n)
    blocks = matrix(x.device, weight.dtype)
    launch(
        fused_linear_kernel,
        (triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(len(flat), ROWS)),
        *(flat, weight, out, bias, norm_weight, norm_bias, added, scale),
        *(len(flat), n, eps, flat.stride(0), weight.stride(0)),
        *(0 if added is None else added.stride(0), *scale_layout(scale, k)),
        K=k,
        GELU=gelu,
        ROWS=ROWS,
        **blocks,
    )
    return out.view(*x.shape[:-1], n).to(x.dtype)


def scale_layout(scale: Tensor | None, k: int) -> tuple[int, int]:
    """The stride of a row of int4 scales, and the columns that share one."""
    return (scale.stride(0), k // scale.shape[1]) if scale is not None and scale.dim() == 2 else (0, k)


fused_linear = register("fused_linear", launch_fused_linear)
