"""append_kv: one program per new position and head, which an int8 cache gives a scale each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvspn.checks import part
from kvspn.triton_kernels.launch import launch, register


@triton.jit
def append_kv_kernel(
    kv, k, v, lengths, finished, kv_scale,
    queries, capacity, kv_part, kv_b, kv_h, kv_s, k_b, k_h, k_q, v_b, v_h, v_q, scale_part, scale_b, scale_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // queries
    i = tl.program_id(0) % queries
    h = tl.program_id(1)
    position = tl.load(lengths + b) + i
    write = (position >= 0) & (position < capacity)
    if finished is not None:
        write = write & (tl.load(finished + b) == 0)
    d = tl.arange(0, BLOCK_D)
    inside = d < tl.where(write, D, 0)
    target = kv + b.to(tl.int64) * kv_b + h.to(tl.int64) * kv_h + position.to(tl.int64) * kv_s + d
    key = tl.load(k + b.to(tl.int64) * k_b + h * k_h + i * k_q + d, mask=inside, other=0)
    value = tl.load(v + b.to(tl.int64) * v_b + h * v_h + i * v_q + d, mask=inside, other=0)
    if kv_scale is not None:
        scale = kv_scale + b.to(tl.int64) * scale_b + h.to(tl.int64) * scale_h + position
        key = _quantise(key, scale, write)
        value = _quantise(value, scale + scale_part, write)
    tl.store(target, key, mask=inside)
    tl.store(target + kv_part, value, mask=inside)


@triton.jit
def _quantise(x, scale, write):
    """x as int8, its scale stored: see `kvspn.ops.append_kv.quantise`."""
    x = x.to(tl.float32)
    # Comparisons drop NaN: it goes into the scale by itself.
    largest = tl.max(tl.abs(x), axis=0) + tl.sum(x - x, axis=0)
    tl.store(scale, tl.div_rn(largest, 127.0), mask=write)
    values = x * tl.div_rn(127.0, largest)
    rounded = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to nearest, halves to even
    return tl.where(tl.abs(values) < 128.0, rounded, 0.0).to(tl.int8)


def launch_append_kv(
    kv: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    layer: int,
    finished: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> None:
    """As :func:`kvspn.ops.append_kv`, unchecked."""
    batch, heads, queries, width = k.shape
    cache, scale = kv[layer], part(kv_scale, layer)
    launch(
        append_kv_kernel,
        (batch * queries, heads),
        *(cache, k, v, lengths, finished, scale, queries, kv.shape[4]),
        *(*cache.stride()[:4], *k.stride()[:3], *v.stride()[:3]),
        *((None,) * 3 if scale is None else scale.stride()[:3]),
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=1,
        # A product fused into the sum that rounds it would be rounded once, and not as the reference does.
        enable_fp_fusion=False,
    )


append_kv = register("append_kv", launch_append_kv)
