"""lm_head_verify: the output embedding of a step's rows, reduced to choices and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.checks import FLOATS, FP32, INT32, Shapes
from kvspn.ops._library import register
from kvspn.ops.fused_linear import check_norm, project
from kvspn.ops.rules import check_packed, constrain, disturb
from kvspn.weights.linear import check_weight, dequantise

K_INF = 2**31 - 1  # the k that accepts every draft
MOST_BEST = 64  # tokens of a row that are told


def check(
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
) -> None:
    shapes = Shapes()
    shapes.tensor("x", x, "B Q K", FLOATS)
    if shapes["Q"] < 1:
        raise ValueError("x must hold at least one query, got Q=0")
    check_weight(shapes, "weight", "scale", weight, scale, "V", "K")
    if not 1 <= shapes["V"] <= K_INF:
        raise ValueError(f"weight must have 1 to {K_INF} rows, got V={shapes['V']}")
    shapes.sizes["Q-1"] = shapes["Q"] - 1
    shapes.tensor("draft", draft, "B Q-1", INT32)
    if ids is not None:
        shapes.tensor("ids", ids, "V", INT32)
        if shapes["Q"] != 1:
            raise ValueError(f"x must hold one query with ids, got Q={shapes['Q']}")
    for name, values in (("mask", mask), ("first_mask", first_mask)):
        if values is not None:
            shapes.tensor(name, values, "V" if ids is None else "M", FP32)
    check_norm(shapes, norm_weight, norm_bias, eps)
    for name, given in (("lengths", lengths), ("tokens", tokens)):
        if (rules is None) != (given is None):
            raise ValueError(f"{name} must be given with rules and with them alone, got one of the two")
    if rules is None and first_mask is not None:
        raise ValueError("rules must be given with first_mask, got None")
    if rules is not None and lengths is not None and tokens is not None:
        check_packed(shapes, rules)
        shapes.tensor("lengths", lengths, "B", INT32)
        shapes.tensor("tokens", tokens, "B N", INT32)
    if scores is not None:
        shapes.tensor("scores", scores, "B Q 3", FP32)
    if (best_tokens is None) != (best_logits is None):
        raise ValueError("best_logits must be given with best_tokens and with it alone, got one of the two")
    if best_tokens is not None:
        shapes.tensor("best_tokens", best_tokens, "B Q n", INT32)
        shapes.tensor("best_logits", best_logits, "B Q n", FP32)
        if not 1 <= shapes["n"] <= MOST_BEST:
            raise ValueError(f"best_tokens must hold 1 to {MOST_BEST} of a row, got n={shapes['n']}")


def reference(
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
    """Logits of Q rows, never stored: the argmax of each row and the rank of each draft.

    The validation of "Parasitic dual-scale modelling" (arXiv 2508.11189): a draft stands if its rank is
    under k. Row j of x follows the j-th token of the step, so it judges draft[:, j].

    Args:
        x: [B, Q, K], fp32, bf16 or fp16.
        weight, scale: [V, K] in any format of :func:`fused_linear`.
        draft: int32 [B, Q-1].
        mask: fp32 [V], added to every row's logits; -inf suppresses a token.
        norm_weight, norm_bias, eps: a LayerNorm of x, as in :func:`fused_linear`.
        ids: int32 [V], with Q = 1: the tokens that the rows of weight stand for, as those of a draft
            vocabulary do. argmax is then one of these, and the masks are of all tokens.
        first_mask: as mask, in its place where a choice is its row's first; with rules.
        rules: int32 [B, 8 or 9], packed by ``kvspn.ops.rules.pack_rules``: a row with a temperature is
            sampled, and one with timestamps keeps to their grammar. Its logits count as
            ``kvspn.ops.rules.constrain`` and then ``disturb`` make them, for argmax and rank alike.
        lengths: int32 [B], with rules: row j chooses the token at the index lengths[b] + j + 1 of row b.
        tokens: int32 [B, N], with rules: of row b the first lengths[b] + 1, which the grammar goes by.
        scores: fp32 [B, Q, 3], written: the log-sum-exp of each row's masked logits, and of these those of
            its choice and of its draft, without noise. A difference is the logarithm of a probability.
        best_tokens, best_logits: int32 and fp32 [B, Q, n], n 1 to 64, written: the tokens of each row with
            the largest masked logits, and these, without noise and whatever top_k; the largest first, of
            equals the smaller id. -1 and -inf where fewer are above -inf, and in a row without a token.

    Returns:
        argmax: int32 [B, Q]; of equal logits the smallest id. -1 where a row has no token to choose: with NaN
            among its logits, or none above -inf.
        rank: int32 [B, Q-1], the number of tokens with a larger logit, plus those equal with a smaller id;
            so rank < 1 means "is the argmax". A draft that is suppressed (its logit is -inf) has rank V; one
            outside 0 .. V-1, or in a row without a token, K_INF, under no k.

    Logits are fp32 and never rounded.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
    """
    matrix = dequantise(weight, scale)
    argmax = draft.new_empty(x.shape[:2])
    rank = torch.full_like(draft, K_INF)
    choices = torch.arange(len(matrix), device=x.device) if ids is None else ids.long()
    for b, drafts in enumerate(draft.tolist()):
        for j, row in enumerate(x[b]):
            logits = project(row, matrix, None, norm_weight, norm_bias, eps)
            added, counted = mask, logits
            if rules is not None and lengths is not None:
                index, first = int(lengths[b]) + j + 1, int(rules[b, 0])
                if first_mask is not None and index == first:
                    added = first_mask
            if added is not None:
                logits = counted = logits + (added if ids is None else added[choices])
            if rules is not None and tokens is not None:
                begin = max(first - int(rules[b, 7]), 0)
                before = [*tokens[b, begin : index - j].tolist(), *drafts[:j]]
                logits = constrain(logits, rules[b], before, choices)
                counted = disturb(logits, rules[b], index, choices)
            chosen = bool(counted.max() > -torch.inf)  # the largest of what holds NaN is NaN
            argmax[b, j] = choices[counted.argmax()] if chosen else -1
            judged = j < len(drafts) and 0 <= drafts[j] < len(logits)
            if chosen and judged:
                own = counted[drafts[j]]
                ahead = (counted > own).sum() + (counted[: drafts[j]] == own).sum()
                rank[b, j] = ahead if own > -torch.inf else len(counted)
            if scores is not None:
                scores[b, j, 0] = logits.logsumexp(0)
                scores[b, j, 1] = logits[counted.argmax()] if chosen else -torch.inf
                scores[b, j, 2] = logits[drafts[j]] if judged else -torch.inf
            if best_tokens is not None and best_logits is not None:
                order = logits.argsort(descending=True, stable=True)[: best_tokens.shape[2]]
                order = order[logits[order] > -torch.inf] if chosen else order[:0]
                best_tokens[b, j], best_logits[b, j] = -1, -torch.inf
                best_tokens[b, j, : len(order)] = choices[order].int()
                best_logits[b, j, : len(order)] = logits[order]
    return argmax, rank


def fake(
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
    return draft.new_empty(x.shape[:2]), torch.empty_like(draft)


lm_head_verify = register(
    "lm_head_verify(Tensor x, Tensor weight, Tensor draft, Tensor? mask=None, Tensor? scale=None, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5, Tensor? ids=None, "
    "Tensor? first_mask=None, Tensor? rules=None, Tensor? lengths=None, Tensor? tokens=None, "
    "Tensor(a!)? scores=None, Tensor(b!)? best_tokens=None, Tensor(c!)? best_logits=None) "
    "-> (Tensor argmax, Tensor rank)",
    check=check,
    fake=fake,
    reference=reference,
)
