"""The tile that fused_linear and lm_head_verify share: [LayerNorm ->] x @ weight.T, in fp32."""

import triton
import triton.language as tl


@triton.jit
def project(
    x, x_stride, row, rows, norm_weight, norm_bias, eps,
    weight, weight_stride, scale, scale_stride, group, column, columns,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` of x [rows, K] times rows ``column`` of weight [columns, K] -> fp32 [row, column]."""
    index = tl.arange(0, BLOCK_K)
    x += row.to(tl.int64)[:, None] * x_stride
    here = (row < rows)[:, None]
    if norm_weight is not None:
        total = tl.zeros_like(here.to(tl.float32))
        for start in range(0, K, BLOCK_K):
            inside = here & (start + index < K)[None, :]
            tile = tl.load(x + (start + index)[None, :], mask=inside, other=0).to(tl.float32)
            total += tl.sum(tile, axis=1, keep_dims=True)
        mean = total / K
        total = tl.zeros_like(mean)
        for start in range(0, K, BLOCK_K):
            inside = here & (start + index < K)[None, :]
            tile = tl.load(x + (start + index)[None, :], mask=inside, other=0).to(tl.float32)
            centred = tl.where(inside, tile - mean, 0)
            total += tl.sum(centred * centred, axis=1, keep_dims=True)
        inverse = 1 / tl.sqrt(total / K + eps)
    sums = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + index
        tile = tl.load(x + at[None, :], mask=here & (at < K)[None, :], other=0).to(tl.float32)
        if norm_weight is not None:
            factor = tl.load(norm_weight + at, mask=at < K, other=0).to(tl.float32)
            tile = (tile - mean) * inverse * factor[None, :]
            if norm_bias is not None:
                tile += tl.load(norm_bias + at, mask=at < K, other=0).to(tl.float32)[None, :]
        matrix = _load(weight, weight_stride, scale, scale_stride, group, column, columns, at, K, FP8)
        sums = dot(tile, matrix, sums, PRECISION)
    return sums


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b.T; elementwise in the interpreter: NumPy's BLAS treats the rows of a tile unalike."""
    if PRECISION == "elementwise":
        sums += tl.sum(a[:, None, :] * b[None, :, :], axis=2)
    else:
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _widen_fp8(byte):
    """e4m3 -> fp32, exactly: the fields where a float has them, 120 between the biases of the exponents."""
    magnitude = (byte & 0x7F).to(tl.int32) << 20
    normal = (magnitude + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = (magnitude + (121 << 23)).to(tl.float32, bitcast=True) - 0.015625
    value = tl.where(magnitude < 1 << 23, subnormal, normal)
    value = tl.where(magnitude == 0x7F << 20, float("nan"), value)
    return tl.where(byte > 127, -value, value)


@triton.jit
def _load(weight, weight_stride, scale, scale_stride, group, column, columns, at, K, FP8: tl.constexpr):
    """A tile of a matrix in any format, in fp32.

    int4: two to a byte, low nibble first, the value plus 8. FP8: e4m3, by its bits: not every GPU has it.
    """
    rows = column.to(tl.int64)[:, None]
    inside = (column >= 0)[:, None] & (column < columns)[:, None] & (at < K)[None, :]
    if weight.dtype.element_ty == tl.uint8 and not FP8:
        byte = tl.load(weight + rows * weight_stride + (at // 2)[None, :], mask=inside, other=0).to(tl.int32)
        value = (((byte >> (at % 2 * 4)[None, :]) & 15) - 8).to(tl.float32)
        value *= tl.load(scale + rows * scale_stride + (at // group)[None, :], mask=inside, other=0)
    else:
        value = tl.load(weight + rows * weight_stride + at[None, :], mask=inside, other=0)
        value = _widen_fp8(value) if FP8 else value.to(tl.float32)
        if scale is not None:
            value *= tl.load(scale + rows, mask=(column >= 0)[:, None] & (column < columns)[:, None], other=0)
    return value
