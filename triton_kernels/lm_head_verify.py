"""lm_head_verify: the vocabulary tile by tile; a tile leaves its best token and how many beat the draft.

First the drafts' own logits, by the same sums as in the tiles; then the tiles; then one program per row
that combines them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvspn.ops import K_INF
from kvspn.triton_kernels.configurations import ROWS, matrix
from kvspn.triton_kernels.fused_linear import scale_layout
from kvspn.triton_kernels.launch import launch, register
from kvspn.triton_kernels.projection import project


@triton.jit
def _draft_of(draft, draft_b, row, rows, queries):
    """The draft that each row judges; -1 for a row that judges none."""
    judges = (row < rows) & (row % queries < queries - 1)
    return tl.load(draft + (row // queries).to(tl.int64) * draft_b + row % queries, mask=judges, other=-1)


@triton.jit
def _masked(logits, mask, column, columns):
    """The mask added, and -inf outside of the vocabulary."""
    if mask is not None:
        logits += tl.load(mask + column, mask=(column >= 0) & (column < columns), other=0)[None, :]
    return tl.where((column < columns)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["rows", "queries"])
def draft_logits_kernel(
    x, weight, own, draft, mask, scale, norm_weight, norm_bias,
    rows, queries, v, eps, x_stride, weight_stride, scale_stride, group, draft_b,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """own[row] = the logit of its draft: column i of the tile is the draft of row i."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, BLOCK_N)
    judged = tl.program_id(0) * ROWS + index
    column = _draft_of(draft, draft_b, tl.where(index < ROWS, judged, rows), rows, queries)
    logits = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, v, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    logits = _masked(logits, mask, column, v)
    diagonal = (row - tl.program_id(0) * ROWS)[:, None] == index[None, :]
    tl.store(own + row, tl.sum(tl.where(diagonal, logits, 0), axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "queries"])
def vocabulary_kernel(
    x, weight, best, choice, ahead, own, draft, mask, scale, norm_weight, norm_bias,
    rows, queries, v, eps, x_stride, weight_stride, scale_stride, group, draft_b,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A tile's largest logit, its smallest id, and how many of its tokens go ahead of the draft.

    With NaN among its logits: infinity and -1, which win over every other tile's.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, v, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    logits = _masked(logits, mask, column, v)
    broken = tl.max((logits != logits).to(tl.int32), axis=1) > 0
    largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=1)
    inside = (column < v)[None, :]
    ids = tl.min(tl.where((logits == largest[:, None]) & inside, column[None, :], v), axis=1)
    at = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(best + at, tl.where(broken, float("inf"), largest), mask=row < rows)
    tl.store(choice + at, tl.where(broken, -1, ids), mask=row < rows)
    if own is not None:
        guess = _draft_of(draft, draft_b, row, rows, queries)[:, None]
        value = tl.load(own + row, mask=row < rows, other=0)[:, None]
        first = (logits > value) | ((logits == value) & (column[None, :] < guess))
        first = first & inside & (column[None, :] != guess)
        tl.store(ahead + at, tl.sum(first.to(tl.int32), axis=1), mask=row < rows)


@triton.jit
def combine_kernel(
    best, choice, ahead, draft, argmax, rank, rows, queries, v, tiles, draft_b,
    TILES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    at = row.to(tl.int64) * tiles + tile
    values = tl.load(best + at, mask=inside, other=float("-inf"))
    ids = tl.load(choice + at, mask=inside, other=v)
    largest = tl.max(values, axis=0)
    chosen = tl.min(tl.where(values == largest, ids, v), axis=0)
    chosen = tl.where(largest > float("-inf"), chosen, -1)
    tl.store(argmax + row, chosen)
    if row % queries < queries - 1:
        guess = _draft_of(draft, draft_b, row, rows, queries)
        count = tl.sum(tl.load(ahead + at, mask=inside, other=0), axis=0)
        place = tl.where((chosen >= 0) & (guess >= 0) & (guess < v), count, LAST)
        tl.store(rank + row // queries * (queries - 1) + row % queries, place)


def launch_lm_head_verify(
    x: Tensor,
    weight: Tensor,
    draft: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvspn.ops.lm_head_verify`, unchecked."""
    batch, queries, k = x.shape
    v, rows = weight.shape[0], batch * queries
    flat = x.reshape(rows, k)
    blocks = matrix(x.device, weight.dtype)
    tiles = triton.cdiv(v, blocks["BLOCK_N"])
    best = flat.new_empty(rows, tiles, dtype=torch.float32)
    choice, ahead = draft.new_empty(2, rows, tiles).unbind()
    argmax, rank = draft.new_empty(batch, queries), draft.new_empty(batch, queries - 1)
    own = flat.new_empty(rows, dtype=torch.float32) if queries > 1 else None
    operands = (mask, scale, norm_weight, norm_bias, rows, queries, v, eps)
    strides = (flat.stride(0), weight.stride(0), *scale_layout(scale, k), draft.stride(0))
    row_blocks = triton.cdiv(rows, ROWS)
    if own is not None:
        launch(
            draft_logits_kernel,
            (row_blocks,),
            *(flat, weight, own, draft, *operands, *strides),
            K=k,
            ROWS=ROWS,
            **blocks,
        )
    launch(
        vocabulary_kernel,
        (tiles, row_blocks),
        *(flat, weight, best, choice, ahead, own, draft, *operands, *strides),
        K=k,
        ROWS=ROWS,
        **blocks,
    )
    launch(
        combine_kernel,
        (rows,),
        *(best, choice, ahead, draft, argmax, rank, rows, queries, v, tiles, draft.stride(0)),
        TILES=triton.next_power_of_2(tiles),
        LAST=K_INF,
        num_warps=4,
    )
    return argmax, rank


lm_head_verify = register("lm_head_verify", launch_lm_head_verify)
