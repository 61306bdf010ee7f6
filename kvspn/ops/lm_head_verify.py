"""lm_head_verify: the output embedding of a step's rows, reduced to choices and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.checks import FLOATS, FP32, INT32, Shapes
from kvspn.ops._library import register
from kvspn.ops.fused_linear import check_norm, project
from kvspn.weights.linear import check_weight, dequantise

K_INF = 2**31 - 1  # the k that accepts every draft


def check(
    x: Tensor,
    weight: Tensor,
    draft: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
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
    if mask is not None:
        shapes.tensor("mask", mask, "V", FP32)
    check_norm(shapes, norm_weight, norm_bias, eps)


def reference(
    x: Tensor,
    weight: Tensor,
    draft: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
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

    Returns:
        argmax: int32 [B, Q]; of equal logits the smallest id. -1 where a row has no token to choose: with NaN
            among its logits, or none above -inf.
        rank: int32 [B, Q-1], the number of tokens with a larger logit, plus those equal with a smaller id;
            so rank < 1 means "is the argmax". A draft outside 0 .. V-1, or in a row without a token, has
            rank K_INF, under no k.

    Logits are fp32 and never rounded.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
    """
    matrix = dequantise(weight, scale)
    argmax = draft.new_empty(x.shape[:2])
    rank = torch.full_like(draft, K_INF)
    for b, drafts in enumerate(draft.tolist()):
        for j, row in enumerate(x[b]):
            logits = project(row, matrix, None, norm_weight, norm_bias, eps)
            logits = logits if mask is None else logits + mask
            chosen = bool(logits.max() > -torch.inf)  # the largest of what holds NaN is NaN
            argmax[b, j] = logits.argmax() if chosen else -1
            if chosen and j < len(drafts) and 0 <= drafts[j] < len(logits):
                own = logits[drafts[j]]
                rank[b, j] = (logits > own).sum() + (logits[: drafts[j]] == own).sum()
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
) -> tuple[Tensor, Tensor]:
    return draft.new_empty(x.shape[:2]), torch.empty_like(draft)


lm_head_verify = register(
    "lm_head_verify(Tensor x, Tensor weight, Tensor draft, Tensor? mask=None, Tensor? scale=None, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-5) -> (Tensor argmax, Tensor rank)",
    check=check,
    fake=fake,
    reference=reference,
)
