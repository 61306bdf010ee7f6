"""flat_kv_attention: fixed splits of the flattened cache, then an ordered combination (docs/triton.md).

A program takes 64 positions of one layer and one key head, reads their K and V once, and serves all the
query rows of that head; what it leaves is the softmax of its split alone, not yet normalised.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvspn.triton_kernels.configurations import ROWS, SPLIT, precision
from kvspn.triton_kernels.launch import launch, register, result
from kvspn.triton_kernels.projection import dot

CHUNK = tl.constexpr(64)  # splits that the combination adds at a time


@triton.jit(do_not_specialize=["queries"])
def attention_split_kernel(
    q, kv, kv_scale, lengths, sums, extremes,
    scale, heads, queries, repeat, capacity, per_layer, first_split, splits,
    q_b, q_h, q_i, kv_n, kv_part, kv_b, kv_h, kv_s, scale_n, scale_part, scale_b, scale_h,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) // per_layer
    start = tl.program_id(0) % per_layer * SPLIT
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # a query head of this key head, and a query
    head, i = row // queries, row % queries
    length = tl.load(lengths + b)
    end = tl.minimum(length + i + 1 if CAUSAL else length + i * 0, capacity)
    last = tl.minimum(length + queries if CAUSAL else length, capacity)
    if start < last:
        d = tl.arange(0, BLOCK_D)
        position = start + tl.arange(0, SPLIT)
        real = (row < repeat * queries)[:, None] & (d < D)[None, :]
        query_at = b.to(tl.int64) * q_b + (h * repeat + head).to(tl.int64) * q_h + i.to(tl.int64) * q_i
        query = tl.load(q + query_at[:, None] + d[None, :], mask=real, other=0).to(tl.float32)
        cache = kv + layer.to(tl.int64) * kv_n + b.to(tl.int64) * kv_b + h.to(tl.int64) * kv_h
        at = position.to(tl.int64)[:, None] * kv_s + d[None, :]
        written = (position < last)[:, None] & (d < D)[None, :]
        keys = tl.load(cache + at, mask=written, other=0).to(tl.float32)
        values = tl.load(cache + kv_part + at, mask=written, other=0).to(tl.float32)

        scores = dot(query, keys, tl.zeros((ROWS, SPLIT), tl.float32), PRECISION) * scale
        if kv_scale is not None:
            scales = kv_scale + layer.to(tl.int64) * scale_n + b.to(tl.int64) * scale_b
            scales += h.to(tl.int64) * scale_h + position
            scores *= tl.load(scales, mask=position < last, other=0)[None, :]
            values *= tl.load(scales + scale_part, mask=position < last, other=0)[:, None]
        scores = tl.where(position[None, :] < end[:, None], scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        weights = tl.exp(scores - tl.where(end > start, largest, 0)[:, None])
        out = dot(weights, tl.trans(values), tl.zeros((ROWS, BLOCK_D), tl.float32), PRECISION)

        flat = tl.program_id(1).to(tl.int64) * repeat * queries + row
        at = flat * splits + first_split + tl.program_id(0)
        tl.store(sums + at[:, None] * D + d[None, :], out, mask=real)
        tl.store(extremes + at * 2, largest, mask=row < repeat * queries)
        tl.store(extremes + at * 2 + 1, tl.sum(weights, axis=1), mask=row < repeat * queries)


@triton.jit(do_not_specialize=["queries"])
def attention_combine_kernel(
    sums, extremes, lengths, tail_lengths, out,
    heads, queries, repeat, capacity, tail_capacity, per_layer, flat_splits,
    SPLITS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One output row: its splits in order, 64 at a time."""
    flat = tl.program_id(0).to(tl.int64)
    i = tl.program_id(0) % queries
    head = tl.program_id(0) // queries % (heads * repeat)
    b = tl.program_id(0) // queries // (heads * repeat)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lengths + b)
    end = tl.minimum(length + i + 1 if CAUSAL else length, capacity)
    largest, total = float("-inf"), 0.0
    summed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, SPLITS, CHUNK):
        split = first + tl.arange(0, CHUNK)
        seen = (split < flat_splits) & (split % per_layer * SPLIT < end)
        if tail_lengths is not None:
            tail_end = tl.minimum(tl.load(tail_lengths + b), tail_capacity)
            seen = seen | ((split >= flat_splits) & ((split - flat_splits) * SPLIT < tail_end))
        seen = seen & (split < SPLITS)
        at = flat * SPLITS + split
        found = tl.load(extremes + at * 2, mask=seen, other=float("-inf"))
        highest = tl.maximum(largest, tl.max(found, axis=0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        keep, factor = tl.exp(largest - base), tl.exp(found - base)
        part = tl.load(sums + at[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0)
        total = total * keep + tl.sum(factor * tl.load(extremes + at * 2 + 1, mask=seen, other=0), axis=0)
        summed = summed * keep + tl.sum(factor[:, None] * part, axis=0)
        largest = highest
    target = out + ((b.to(tl.int64) * queries + i) * heads * repeat + head) * D + d
    tl.store(target, summed / tl.where(total > 0, total, 1.0), mask=d < D)


def launch_flat_kv_attention(
    q: Tensor,
    kv: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None = None,
    tail: Tensor | None = None,
    tail_lengths: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """As :func:`kvspn.ops.flat_kv_attention`, unchecked."""
    batch, query_heads, queries, width = q.shape
    layers, _, _, heads, capacity, _ = kv.shape
    repeat = query_heads // heads
    tail_capacity = 0 if tail is None else tail.shape[3]
    per_layer = triton.cdiv(capacity, SPLIT)
    flat_splits = layers * per_layer
    splits = flat_splits + triton.cdiv(tail_capacity, SPLIT)
    sums = q.new_empty(batch * query_heads * queries, splits, width, dtype=torch.float32)
    extremes = q.new_empty(batch * query_heads * queries, splits, 2, dtype=torch.float32)
    out = result(q, batch, queries, query_heads * width)
    block_d = max(triton.next_power_of_2(width), 16)

    def launch_splits(
        first: int, keys: Tensor, valid: Tensor, causal: bool, kv_scale: Tensor | None = None
    ) -> None:
        """All splits of keys [n, 2, B, H, S, D]."""
        per_layer = triton.cdiv(keys.shape[4], SPLIT)
        launch(
            attention_split_kernel,
            (len(keys) * per_layer, batch * heads, triton.cdiv(repeat * queries, ROWS)),
            *(q, keys, kv_scale, valid, sums, extremes, width**-0.5 if scale is None else scale),
            *(heads, queries, repeat, keys.shape[4], per_layer, first, splits),
            *(*q.stride()[:3], *keys.stride()[:5]),
            *((None,) * 4 if kv_scale is None else kv_scale.stride()[:4]),
            CAUSAL=causal,
            D=width,
            BLOCK_D=block_d,
            ROWS=ROWS,
            SPLIT=SPLIT,
            PRECISION=precision(q.device, q.dtype),
            num_warps=4,
        )

    launch_splits(0, kv, lengths, causal, kv_scale)
    if tail is not None and tail_lengths is not None:
        launch_splits(flat_splits, tail[None], tail_lengths, False)
    launch(
        attention_combine_kernel,
        (batch * query_heads * queries,),
        *(sums, extremes, lengths, tail_lengths, out),
        *(heads, queries, repeat, capacity, tail_capacity, per_layer, flat_splits),
        SPLITS=splits,
        CAUSAL=causal,
        D=width,
        BLOCK_D=block_d,
        SPLIT=SPLIT,
        num_warps=1,
    )
    return out.to(q.dtype)


flat_kv_attention = register("flat_kv_attention", launch_flat_kv_attention)
