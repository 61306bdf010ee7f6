"""lm_head_verify: the vocabulary tile by tile; a tile leaves its best token and how many beat the draft.

First the drafts' own logits, by the same sums as in the tiles; then the tiles; then one program per row
that combines them.
"""

from __future__ import annotations

import functools

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
def _masked(logits, mask, first_mask, rules, rules_b, lengths, ids, row, rows, queries, column, columns):
    """The row's mask added, and -inf outside of the vocabulary."""
    inside = (column >= 0) & (column < columns)
    token = column if ids is None else tl.load(ids + column, mask=inside, other=0)
    added = tl.zeros_like(logits)
    if mask is not None:
        added += tl.load(mask + token, mask=inside, other=0)[None, :]
    if first_mask is not None:
        b = (row // queries).to(tl.int64)
        index = tl.load(lengths + b, mask=row < rows, other=0) + row % queries + 1
        first = index == tl.load(rules + b * rules_b, mask=row < rows, other=-1)
        other = tl.load(first_mask + token, mask=inside, other=0)[None, :]
        added = tl.where(first[:, None], other, added)
    return tl.where((column < columns)[None, :], logits + added, float("-inf"))


@triton.jit
def _disturbed(logits, rules, rules_b, lengths, ids, row, rows, queries, column, columns):
    """Masked logits -> what they count as under the rows' rules: see kvspn.ops.rules.disturb."""
    if rules is not None:
        inside = (column >= 0) & (column < columns)
        token = column if ids is None else tl.load(ids + column, mask=inside, other=0)
        b = (row // queries).to(tl.int64)
        index = tl.load(lengths + b, mask=row < rows, other=0) + row % queries + 1
        rule = rules + b * rules_b
        temperature = tl.load(rule + 1, mask=row < rows, other=0).to(tl.float32, bitcast=True)[:, None]
        low = tl.load(rule + 2, mask=row < rows, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(rule + 3, mask=row < rows, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        zeros = tl.zeros(logits.shape, tl.uint32)
        token = zeros + token.to(tl.uint32)[None, :]
        index = zeros + index.to(tl.uint32)[:, None]
        bits, _, _, _ = tl.philox((low | (high << 32))[:, None], token, index, zeros, zeros)
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1 / 8388608)
        sampled = logits / tl.where(temperature > 0, temperature, 1) - tl.log(-tl.log(uniform))
        logits = tl.where(temperature > 0, sampled, logits)
    return logits


@triton.jit(do_not_specialize=["rows", "queries"])
def draft_logits_kernel(
    x, weight, own, own_logit, draft, mask, first_mask, rules, lengths, ids, scale, norm_weight, norm_bias,
    rows, queries, v, eps, x_stride, weight_stride, scale_stride, group, draft_b, rules_b,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """own[row] = what the logit of its draft counts as: column i of the tile is the draft of row i.

    own_logit, if it is there: the logit, without the noise of sampling.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, BLOCK_N)
    judged = tl.program_id(0) * ROWS + index
    column = _draft_of(draft, draft_b, tl.where(index < ROWS, judged, rows), rows, queries)
    logits = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, v, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    logits = _masked(logits, mask, first_mask, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    diagonal = (row - tl.program_id(0) * ROWS)[:, None] == index[None, :]
    if own_logit is not None:
        tl.store(own_logit + row, tl.sum(tl.where(diagonal, logits, 0), axis=1), mask=row < rows)
    counted = _disturbed(logits, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    tl.store(own + row, tl.sum(tl.where(diagonal, counted, 0), axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "queries"])
def vocabulary_kernel(
    x, weight, best, choice, ahead, parts, own, draft, mask, first_mask, rules, lengths, ids,
    scale, norm_weight, norm_bias,
    rows, queries, v, eps, x_stride, weight_stride, scale_stride, group, draft_b, rules_b,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A tile's largest logit, its smallest id, and how many of its tokens go ahead of the draft.

    With NaN among its logits: infinity and -1, which win over every other tile's. parts [3, rows, tiles], if
    it is there: the largest logit without the noise of sampling, the sum of exponentials over it, and the
    best token's logit.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, v, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    masked = _masked(logits, mask, first_mask, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    logits = _disturbed(masked, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    broken = tl.max((logits != logits).to(tl.int32), axis=1) > 0
    largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=1)
    inside = (column < v)[None, :]
    best_column = tl.min(tl.where((logits == largest[:, None]) & inside, column[None, :], v), axis=1)
    at = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(best + at, tl.where(broken, float("inf"), largest), mask=row < rows)
    tl.store(choice + at, tl.where(broken, -1, best_column), mask=row < rows)
    if parts is not None:
        size = rows.to(tl.int64) * tl.num_programs(0)
        top = tl.max(masked, axis=1)
        exponentials = tl.exp(masked - tl.where(top > float("-inf"), top, 0)[:, None])
        taken = tl.where(column[None, :] == best_column[:, None], masked, float("-inf"))
        tl.store(parts + at, top, mask=row < rows)
        tl.store(parts + size + at, tl.sum(exponentials, axis=1), mask=row < rows)
        tl.store(parts + 2 * size + at, tl.max(taken, axis=1), mask=row < rows)
    if own is not None:
        guess = _draft_of(draft, draft_b, row, rows, queries)[:, None]
        value = tl.load(own + row, mask=row < rows, other=0)[:, None]
        first = (logits > value) | ((logits == value) & (column[None, :] < guess))
        first = first & inside & (column[None, :] != guess)
        tl.store(ahead + at, tl.sum(first.to(tl.int32), axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "queries"])
def combine_kernel(
    best, choice, ahead, parts, own_logit, ids, draft, argmax, rank, scores,
    rows, queries, v, tiles, draft_b, scores_b, scores_q,
    TILES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    at = row.to(tl.int64) * tiles + tile
    values = tl.load(best + at, mask=inside, other=float("-inf"))
    columns = tl.load(choice + at, mask=inside, other=v)
    largest = tl.max(values, axis=0)
    chosen = tl.min(tl.where(values == largest, columns, v), axis=0)
    chosen = tl.where(largest > float("-inf"), chosen, -1)
    judges = row % queries < queries - 1
    if judges:
        guess = _draft_of(draft, draft_b, row, rows, queries)
        count = tl.sum(tl.load(ahead + at, mask=inside, other=0), axis=0)
        place = tl.where((chosen >= 0) & (guess >= 0) & (guess < v), count, LAST)
        tl.store(rank + row // queries * (queries - 1) + row % queries, place)
    if scores is not None:
        size = rows.to(tl.int64) * tiles
        tops = tl.load(parts + at, mask=inside, other=float("-inf"))
        sums = tl.load(parts + size + at, mask=inside, other=0)
        taken = tl.load(parts + 2 * size + at, mask=inside & (columns == chosen), other=float("-inf"))
        top = tl.max(tops, axis=0)
        total = tl.sum(tl.where(tops > float("-inf"), sums * tl.exp(tops - top), 0), axis=0)
        to = scores + (row // queries).to(tl.int64) * scores_b + row % queries * scores_q
        tl.store(to, top + tl.log(total))
        tl.store(to + 1, tl.max(taken, axis=0))
        guess = _draft_of(draft, draft_b, row, rows, queries)
        judged = (guess >= 0) & (guess < v)
        tl.store(to + 2, tl.load(own_logit + row, mask=judged, other=float("-inf")))
    token = chosen
    if ids is not None:
        token = tl.load(ids + chosen, mask=chosen >= 0, other=-1)
    tl.store(argmax + row, token)


def launch_lm_head_verify(
    x: Tensor,
    weight: Tensor,
    draft: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    ids: Tensor | None = None,
    first_mask: Tensor | None = None,
    rules: Tensor | None = None,
    lengths: Tensor | None = None,
    tokens: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvspn.ops.lm_head_verify`, unchecked."""
    batch, queries, k = x.shape
    v, rows = weight.shape[0], batch * queries
    flat = x.reshape(rows, k)
    blocks = matrix(x.device, weight.dtype)
    tiles = triton.cdiv(v, blocks["BLOCK_N"])
    floats = functools.partial(flat.new_empty, dtype=torch.float32)
    best = floats(rows, tiles)
    choice, ahead = draft.new_empty(2, rows, tiles).unbind()
    parts = None if scores is None else floats(3, rows, tiles)
    argmax, rank = draft.new_empty(batch, queries), draft.new_empty(batch, queries - 1)
    judged = queries > 1
    own, own_logit = floats(rows) if judged else None, floats(rows) if judged and scores is not None else None
    choosing = (mask, first_mask, rules, lengths, ids)
    operands = (scale, norm_weight, norm_bias, rows, queries, v, eps)
    rules_b = None if rules is None else rules.stride(0)
    strides = (flat.stride(0), weight.stride(0), *scale_layout(scale, k), draft.stride(0), rules_b)
    row_blocks = triton.cdiv(rows, ROWS)
    if own is not None:
        launch(
            draft_logits_kernel,
            (row_blocks,),
            *(flat, weight, own, own_logit, draft, *choosing, *operands, *strides),
            K=k,
            ROWS=ROWS,
            **blocks,
        )
    launch(
        vocabulary_kernel,
        (tiles, row_blocks),
        *(flat, weight, best, choice, ahead, parts, own, draft, *choosing, *operands, *strides),
        K=k,
        ROWS=ROWS,
        **blocks,
    )
    scores_strides = (None, None) if scores is None else scores.stride()[:2]
    # Where nothing is judged, own_logit is never read.
    own_logit = parts if own_logit is None else own_logit
    launch(
        combine_kernel,
        (rows,),
        *(best, choice, ahead, parts, own_logit, ids, draft, argmax, rank, scores),
        *(rows, queries, v, tiles, draft.stride(0), *scores_strides),
        TILES=triton.next_power_of_2(tiles),
        LAST=K_INF,
        num_warps=4,
    )
    return argmax, rank


lm_head_verify = register("lm_head_verify", launch_lm_head_verify)
