"""lm_head_verify: the vocabulary tile by tile; a tile leaves its best token and how many beat the draft.

First, with rules, what the grammar of each row lets come next; then the drafts' own logits, by the same sums
as in the tiles; then the tiles; then one program per row that combines them. With a top_k, or where the best
tokens are asked for, the tiles leave the masked logits too, and at last a program per row goes through them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvspn.ops import K_INF
from kvspn.ops.rules import RULE_WORDS
from kvspn.triton_kernels.configurations import ROWS, matrix
from kvspn.triton_kernels.fused_linear import scale_layout
from kvspn.triton_kernels.launch import launch, register
from kvspn.triton_kernels.projection import project


@triton.jit
def _draft_of(draft, draft_b, row, rows, queries):
    """The draft that each row judges; -1 for a row that judges none."""
    judges = (row < rows) & (row % queries < queries - 1)
    return tl.load(draft + (row // queries).to(tl.int64) * draft_b + row % queries, mask=judges, other=-1)


@triton.jit(do_not_specialize=["rows", "queries", "longest"])
def windows_kernel(
    windows, rules, lengths, tokens, draft,
    rows, queries, longest, rules_b, tokens_b, draft_b,
    BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """windows [rows, 3]: the first token of text, and the first and last timestamp, that may come next.

    One program a row, whose text is its own tokens, from the first that belongs to it, and the drafts of the
    queries in front. See kvspn.ops.rules.constrain.
    """
    row = tl.program_id(0)
    b, query = (row // queries).to(tl.int64), row % queries
    rule = rules + b * rules_b
    times = tl.load(rule + 4)
    begin = tl.maximum(tl.load(rule) - tl.load(rule + 7), 0)
    end = tl.load(lengths + b) + 1
    own = tl.maximum(end - begin, 0)
    count = own + query
    at = tl.arange(0, BLOCK)
    said = tl.load(tokens + b * tokens_b + begin + at, mask=(at < own) & (begin + at < longest), other=-1)
    guessed = tl.load(draft + b * draft_b + at - own, mask=(at >= own) & (at < count), other=-1)
    token = tl.where(at < own, said, guessed)
    time = tl.max(tl.where(token >= times, token, -1), axis=0)
    newest = tl.max(tl.where(at == count - 1, token, -1), axis=0)
    before = tl.max(tl.where(at == count - 2, token, -1), axis=0)
    begun = (newest >= times) & ((count == 1) | (before >= times))  # a segment has just begun
    ended = (newest >= times) & (begun == 0)
    lowest = tl.where(newest < times, tl.where(time < 0, times, time + 1), tl.where(begun, LAST, time))
    text = tl.where(ended, tl.load(rule + 5), 0)
    highest = tl.where(begun, LAST - 1, LAST)
    empty = count == 0
    tl.store(windows + 3 * row, tl.where(empty, times, text))
    tl.store(windows + 3 * row + 1, tl.where(empty, times, lowest))
    tl.store(windows + 3 * row + 2, tl.where(empty, tl.load(rule + 6), highest))


@triton.jit
def _timestamps(token, rules, rules_b, row, rows, queries):
    """Which of the tokens are timestamps in each row."""
    times = tl.load(rules + (row // queries).to(tl.int64) * rules_b + 4, mask=row < rows, other=0)[:, None]
    return (times > 0) & (token[None, :] >= times)


@triton.jit
def _masked(
    logits, mask, first_mask, rules, rules_b, lengths, windows, ids, row, rows, queries, column, columns
):  # fmt: skip
    """The row's mask added, -inf where its grammar forbids the token, and outside of the vocabulary."""
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
    if rules is not None:
        window = windows + 3 * row
        text = tl.load(window, mask=row < rows, other=0)[:, None]
        lowest = tl.load(window + 1, mask=row < rows, other=0)[:, None]
        highest = tl.load(window + 2, mask=row < rows, other=0)[:, None]
        timed = tl.load(rules + (row // queries).to(tl.int64) * rules_b + 4, mask=row < rows, other=0) > 0
        time = _timestamps(token, rules, rules_b, row, rows, queries)
        token = token[None, :]
        allowed = tl.where(time, (token >= lowest) & (token <= highest), token >= text)
        added += tl.where(allowed | (timed[:, None] == 0), 0, float("-inf"))
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
    x, weight, own, own_logit, draft, mask, first_mask, rules, lengths, windows, ids,
    scale, norm_weight, norm_bias,
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
    logits = _masked(
        logits, mask, first_mask, rules, rules_b, lengths, windows, ids, row, rows, queries, column, v
    )
    diagonal = (row - tl.program_id(0) * ROWS)[:, None] == index[None, :]
    if own_logit is not None:
        tl.store(own_logit + row, tl.sum(tl.where(diagonal, logits, 0), axis=1), mask=row < rows)
    counted = _disturbed(logits, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    tl.store(own + row, tl.sum(tl.where(diagonal, counted, 0), axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "queries"])
def vocabulary_kernel(
    x, weight, best, choice, ahead, parts, kept, own, draft, mask, first_mask, rules, lengths, windows, ids,
    scale, norm_weight, norm_bias,
    rows, queries, v, eps, x_stride, weight_stride, scale_stride, group, draft_b, rules_b,
    K: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Of a tile's tokens of each kind, text and timestamps (without rules all are text): the largest logit,
    its smallest id, and how many go ahead of the draft.

    With NaN among the logits: infinity and -1, which win over every other tile's. best, choice, ahead
    [KINDS, rows, tiles]; parts [3, KINDS, rows, tiles], if it is there: the largest logit without the noise
    of sampling, the sum of exponentials over it, and the best token's logit; kept [rows, v], if it is there:
    the logits without the noise.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = project(
        x, x_stride, row, rows, norm_weight, norm_bias, eps,
        weight, weight_stride, scale, scale_stride, group, column, v, K, BLOCK_K, PRECISION, FP8,
    )  # fmt: skip
    all_masked = _masked(
        logits, mask, first_mask, rules, rules_b, lengths, windows, ids, row, rows, queries, column, v
    )
    counted = _disturbed(all_masked, rules, rules_b, lengths, ids, row, rows, queries, column, v)
    inside = (column < v)[None, :]
    if kept is not None:
        to = kept + row.to(tl.int64)[:, None] * v + column[None, :]
        tl.store(to, all_masked, mask=inside & (row < rows)[:, None])
    size = rows.to(tl.int64) * tl.num_programs(0)
    for kind in tl.static_range(KINDS):
        masked, logits, mine = all_masked, counted, inside
        if KINDS == 2:
            token = column if ids is None else tl.load(ids + column, mask=column < v, other=0)
            mine = inside & (_timestamps(token, rules, rules_b, row, rows, queries) == kind)
            masked = tl.where(mine, masked, float("-inf"))
            logits = tl.where(mine, logits, float("-inf"))
        broken = tl.max((logits != logits).to(tl.int32), axis=1) > 0
        largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=1)
        best_column = tl.min(tl.where((logits == largest[:, None]) & mine, column[None, :], v), axis=1)
        at = kind * size + row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + at, tl.where(broken, float("inf"), largest), mask=row < rows)
        tl.store(choice + at, tl.where(broken, -1, best_column), mask=row < rows)
        if parts is not None:
            top = tl.max(masked, axis=1)
            exponentials = tl.exp(masked - tl.where(top > float("-inf"), top, 0)[:, None])
            taken = tl.where(column[None, :] == best_column[:, None], masked, float("-inf"))
            tl.store(parts + at, top, mask=row < rows)
            tl.store(parts + KINDS * size + at, tl.sum(exponentials, axis=1), mask=row < rows)
            tl.store(parts + 2 * KINDS * size + at, tl.max(taken, axis=1), mask=row < rows)
        if own is not None:
            guess = _draft_of(draft, draft_b, row, rows, queries)[:, None]
            value = tl.load(own + row, mask=row < rows, other=0)[:, None]
            first = (logits > value) | ((logits == value) & (column[None, :] < guess))
            first = first & mine & (column[None, :] != guess)
            tl.store(ahead + at, tl.sum(first.to(tl.int32), axis=1), mask=row < rows)


@triton.jit
def _best_of_tiles(best, choice, at, inside, v):
    """The largest logit of a row's tiles, and the smallest id that has it."""
    values = tl.load(best + at, mask=inside, other=float("-inf"))
    columns = tl.load(choice + at, mask=inside, other=v)
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where(values == largest, columns, v), axis=0)


@triton.jit
def _partition(parts, size, at, inside):
    """The largest logit of a row's tiles, and the sum of exponentials over it."""
    tops = tl.load(parts + at, mask=inside, other=float("-inf"))
    sums = tl.load(parts + size + at, mask=inside, other=0)
    top = tl.max(tops, axis=0)
    over = tl.where(top > float("-inf"), top, 0)
    return top, tl.sum(tl.where(tops > float("-inf"), sums * tl.exp(tops - over), 0), axis=0)


@triton.jit(do_not_specialize=["rows", "queries"])
def combine_kernel(
    best, choice, ahead, parts, own, own_logit, rules, windows, ids, draft, argmax, rank, scores,
    rows, queries, v, tiles, draft_b, rules_b, scores_b, scores_q,
    KINDS: tl.constexpr, TILES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A row's choice, its draft's rank and their scores, from what the tiles have left of each kind.

    Where all timestamps together are likelier than every token of text, they alone count, and the row's
    window says so.
    """
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    size = rows.to(tl.int64) * tiles
    at = row.to(tl.int64) * tiles + tile
    kind = 0  # whose best it is
    largest, chosen = _best_of_tiles(best, choice, at, inside, v)
    if parts is not None:
        top, total = _partition(parts, KINDS * size, at, inside)
    forced = False
    if KINDS == 2:
        time_largest, time_chosen = _best_of_tiles(best, choice, size + at, inside, v)
        time_top, time_total = _partition(parts, KINDS * size, size + at, inside)
        numbers = (largest < float("inf")) & (time_largest < float("inf"))  # Else one is NaN.
        forced = numbers & (time_total > 0) & (time_top + tl.log(time_total) > top)
        over = tl.where(forced, time_top, tl.maximum(top, time_top))
        text_total = tl.where((total > 0) & (forced == 0), total * tl.exp(top - over), 0)
        total = text_total + tl.where(time_total > 0, time_total * tl.exp(time_top - over), 0)
        top = over
        equal = (time_largest == largest) & (time_chosen < chosen)
        timed = forced | (time_largest > largest) | equal
        largest = tl.where(timed, time_largest, largest)
        chosen = tl.where(timed, time_chosen, chosen)
        kind = timed.to(tl.int32)
        rule_times = tl.load(rules + (row // queries).to(tl.int64) * rules_b + 4)
        tl.store(windows + 3 * row, rule_times, mask=forced)
    chosen = tl.where(largest > float("-inf"), chosen, -1)
    judges = row % queries < queries - 1
    suppressed = False
    if judges:
        guess = _draft_of(draft, draft_b, row, rows, queries)
        judged = (guess >= 0) & (guess < v)
        count = tl.sum(tl.load(ahead + at, mask=inside & (forced == 0), other=0), axis=0)
        suppressed = tl.load(own + row) == float("-inf")
        if KINDS == 2:
            count += tl.sum(tl.load(ahead + size + at, mask=inside, other=0), axis=0)
            suppressed = suppressed | (forced & (guess < rule_times))
        place = tl.where(suppressed, v, count)
        place = tl.where((chosen >= 0) & judged, place, LAST)
        tl.store(rank + row // queries * (queries - 1) + row % queries, place)
    if scores is not None:
        columns = tl.load(choice + kind * size + at, mask=inside, other=v)
        taken = tl.load(
            parts + (2 * KINDS + kind) * size + at, mask=inside & (columns == chosen), other=float("-inf")
        )
        to = scores + (row // queries).to(tl.int64) * scores_b + row % queries * scores_q
        tl.store(to, top + tl.log(total))
        tl.store(to + 1, tl.max(taken, axis=0))
        guess = _draft_of(draft, draft_b, row, rows, queries)
        judged = (guess >= 0) & (guess < v) & (suppressed == 0)
        tl.store(to + 2, tl.load(own_logit + row, mask=judged, other=float("-inf")))
    token = chosen
    if ids is not None:
        token = tl.load(ids + chosen, mask=chosen >= 0, other=-1)
    tl.store(argmax + row, token)


@triton.jit
def _order(logits):
    """uint32, larger for a larger logit."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 is 0.
    return (bits ^ tl.where(bits < 0, -1, -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "queries"])
def kept_kernel(
    kept, rules, lengths, windows, ids, draft, argmax, rank, scores, best_tokens, best_logits,
    rows, queries, v, draft_b, rules_b, scores_b, scores_q, tokens_b, tokens_q, logits_b, logits_q,
    BLOCK: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """From all masked logits of a row, a program each: its N best tokens, and the draw of a rule with top_k.

    The draw is among the logits that are no smaller than the top_k-th largest, which is found bit by bit.
    CUT: whether the rules have one.
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    b, query = (tl.program_id(0) // queries).to(tl.int64), tl.program_id(0) % queries
    column = tl.arange(0, BLOCK)
    inside = column < v
    logits = tl.load(kept + tl.program_id(0).to(tl.int64) * v + column, mask=inside, other=float("-inf"))
    token = column if ids is None else tl.load(ids + column, mask=inside, other=0)
    if rules is not None:
        rule = rules + b * rules_b
        times, text = tl.load(rule + 4), tl.load(windows + 3 * tl.program_id(0))
        logits = tl.where((times > 0) & (token < times) & (token < text), float("-inf"), logits)
    chosen = tl.load(argmax + tl.program_id(0)) >= 0
    left = logits
    for i in tl.static_range(N):
        largest = tl.max(left, axis=0)
        at = tl.min(tl.where(left == largest, column, v), axis=0)
        there = chosen & (largest > float("-inf"))
        best = tl.sum(tl.where(column == at, token, 0), axis=0)
        tl.store(best_tokens + b * tokens_b + query * tokens_q + i, tl.where(there, best, -1))
        tl.store(best_logits + b * logits_b + query * logits_q + i, tl.where(there, largest, float("-inf")))
        left = tl.where(column == at, float("-inf"), left)
    if CUT:
        rule = rules + b * rules_b
        cut = tl.where(tl.load(rule + 1).to(tl.float32, bitcast=True) > 0, tl.load(rule + 8), 0)
        if chosen & (cut > 0):
            order = _order(logits)
            least = tl.zeros([1], tl.uint32)
            bit = tl.full([1], 1 << 31, tl.uint32)
            for _ in tl.static_range(32):
                count = tl.sum((inside & (order >= least + bit)).to(tl.int32), axis=0)
                least = tl.where(count >= cut, least + bit, least)
                bit = bit >> 1
            drawn = _disturbed(logits[None, :], rules, rules_b, lengths, ids, row, rows, queries, column, v)
            drawn = tl.where((order >= least) & inside, tl.max(drawn, axis=0), float("-inf"))  # of one row
            largest = tl.max(drawn, axis=0)
            at = tl.min(tl.where(drawn == largest, column, v), axis=0)
            tl.store(argmax + tl.program_id(0), tl.sum(tl.where(column == at, token, 0), axis=0))
            if scores is not None:
                to = scores + b * scores_b + query * scores_q
                tl.store(to + 1, tl.max(tl.where(column == at, logits, float("-inf")), axis=0))
            if query < queries - 1:
                guess = tl.load(draft + b * draft_b + query)
                own = tl.max(tl.where(column == guess, drawn, float("-inf")), axis=0)
                ahead = (drawn > own) | ((drawn == own) & (column < guess))
                place = tl.where(own > float("-inf"), tl.sum(ahead.to(tl.int32), axis=0), v)
                judged = (guess >= 0) & (guess < v)
                tl.store(rank + b * (queries - 1) + query, place, mask=judged)


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
    best_tokens: Tensor | None = None,
    best_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`kvspn.ops.lm_head_verify`, unchecked."""
    batch, queries, k = x.shape
    v, rows = weight.shape[0], batch * queries
    flat = x.reshape(rows, k)
    blocks = matrix(x.device, weight.dtype)
    tiles = triton.cdiv(v, blocks["BLOCK_N"])
    kinds = 1 if rules is None else 2
    floats = functools.partial(flat.new_empty, dtype=torch.float32)
    best = floats(kinds, rows, tiles)
    choice, ahead = draft.new_empty(2, kinds, rows, tiles).unbind()
    parts = None if scores is None and rules is None else floats(3, kinds, rows, tiles)
    cut = rules is not None and rules.shape[1] > RULE_WORDS
    kept = floats(rows, v) if cut or best_tokens is not None else None
    argmax, rank = draft.new_empty(batch, queries), draft.new_empty(batch, queries - 1)
    judged = queries > 1
    own, own_logit = floats(rows) if judged else None, floats(rows) if judged and scores is not None else None
    rules_b, windows = None, None
    if rules is not None and lengths is not None and tokens is not None:
        rules_b, windows = rules.stride(0), rules.new_empty(rows, 3)
        launch(
            windows_kernel,
            (rows,),
            *(windows, rules, lengths, tokens, draft, rows, queries, tokens.shape[1]),
            *(rules_b, tokens.stride(0), draft.stride(0)),
            BLOCK=triton.next_power_of_2(tokens.shape[1] + queries),
            LAST=K_INF,
            num_warps=4,
        )
    choosing = (mask, first_mask, rules, lengths, windows, ids)
    operands = (scale, norm_weight, norm_bias, rows, queries, v, eps)
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
        *(flat, weight, best, choice, ahead, parts, kept, own, draft, *choosing, *operands, *strides),
        K=k,
        KINDS=kinds,
        ROWS=ROWS,
        **blocks,
    )
    scores_strides = (None, None) if scores is None else scores.stride()[:2]
    # Where nothing is judged, neither is read.
    own = best if own is None else own
    own_logit = own if own_logit is None else own_logit
    launch(
        combine_kernel,
        (rows,),
        *(best, choice, ahead, parts, own, own_logit, rules, windows, ids, draft, argmax, rank, scores),
        *(rows, queries, v, tiles, draft.stride(0), rules_b, *scores_strides),
        KINDS=kinds,
        TILES=triton.next_power_of_2(tiles),
        LAST=K_INF,
        num_warps=4,
    )
    if kept is not None:
        listed = (None, None, None, None)
        if best_tokens is not None and best_logits is not None:
            listed = (*best_tokens.stride()[:2], *best_logits.stride()[:2])
        block = triton.next_power_of_2(v)
        launch(
            kept_kernel,
            (rows,),
            *(kept, rules, lengths, windows, ids, draft, argmax, rank, scores, best_tokens, best_logits),
            *(rows, queries, v, draft.stride(0), rules_b, *scores_strides, *listed),
            BLOCK=block,
            N=0 if best_tokens is None else best_tokens.shape[2],
            CUT=cut,
            num_warps=min(max(block // 2048, 4), 16),
        )
    return argmax, rank


lm_head_verify = register("lm_head_verify", launch_lm_head_verify)
