"""decoder_step: draft, verify, accept and roll back: one step of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.checks import BOOL, FLOATS, FP32, INT32, Shapes, boolean, integer, part, same_dtype
from kvspn.ops._library import register
from kvspn.ops.accept_and_rollback import reference as accept_and_rollback
from kvspn.ops.append_kv import reference as append_kv
from kvspn.ops.flat_kv_attention import reference as flat_kv_attention
from kvspn.ops.fused_linear import reference as fused_linear
from kvspn.ops.lm_head_verify import K_INF
from kvspn.ops.lm_head_verify import reference as lm_head_verify
from kvspn.ops.rules import check_packed
from kvspn.weights import (
    WHISPER,
    Architecture,
    DecoderWeights,
    DraftBlockWeights,
    LayerWeights,
    Linear,
    Norm,
)

REFERENCE = SimpleNamespace(
    append_kv=append_kv,
    flat_kv_attention=flat_kv_attention,
    fused_linear=fused_linear,
    lm_head_verify=lm_head_verify,
    accept_and_rollback=accept_and_rollback,
)
"""The ops that a step is composed of; a backend brings its own by these names."""

MOST_DRAFTS = 15  # of a row in one step

_ALL = (slice(None), slice(None))  # layers, and keys and values alike


class Caches(NamedTuple):
    """A batch's keys and values, of its tokens and of the encoder: as in :class:`kvspn.engines.StepCache`."""

    kv: Tensor
    lengths: Tensor
    cross_kv: Tensor
    cross_lengths: Tensor
    kv_scale: Tensor | None = None
    cross_kv_scale: Tensor | None = None
    cross_queries: Tensor | None = None

    def row(self, b: int) -> Caches:
        """One row as a batch, in the same memory."""
        here = slice(b, b + 1)
        return Caches(
            self.kv[:, :, here],
            self.lengths[here],
            self.cross_kv[:, :, here],
            self.cross_lengths[here],
            part(self.kv_scale, *_ALL, here),
            part(self.cross_kv_scale, *_ALL, here),
            part(self.cross_queries, slice(None), here),
        )


class StepState(NamedTuple):
    """What a step moves on: ``kvspn_batch`` of the C ABI. Tensors as in :func:`accept_and_rollback`."""

    caches: Caches
    tokens: Tensor
    finished: Tensor
    stats: Tensor

    def row(self, b: int) -> StepState:
        """One row as a batch, in the same memory."""
        here = slice(b, b + 1)
        return StepState(self.caches.row(b), self.tokens[here], self.finished[here], self.stats[here])


class StepRule(NamedTuple):
    """How a step drafts and chooses: ``kvspn_step_params`` of the C ABI. As in :func:`decoder_step`."""

    mask: Tensor | None
    k: int
    eos: int
    max_length: int
    use_draft: bool = True
    draft_tokens: Tensor | None = None
    first_mask: Tensor | None = None
    rules: Tensor | None = None
    log_probs: Tensor | None = None

    def row(self, b: int) -> StepRule:
        """That of one row."""
        here = slice(b, b + 1)
        return self._replace(
            draft_tokens=part(self.draft_tokens, here),
            rules=part(self.rules, here),
            log_probs=part(self.log_probs, here),
        )


def check(
    kv: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    finished: Tensor,
    stats: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    k: int,
    eos: int,
    max_length: int,
    use_draft: bool = True,
    groups: int = 0,
    last_layer_only: bool = False,
    encoder_stride: int = 1,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
    draft_tokens: Tensor | None = None,
    first_mask: Tensor | None = None,
    rules: Tensor | None = None,
    log_probs: Tensor | None = None,
) -> None:
    shapes = Shapes()
    shapes.cache("kv", kv, kv_scale, "L 2 B H S D")
    shapes.tensor("lengths", lengths, "B", INT32)
    shapes.tensor("tokens", tokens, "B N", INT32)
    shapes.tensor("finished", finished, "B", BOOL)
    shapes.tensor("stats", stats, "B 3", INT32)
    shapes.cache("cross_kv", cross_kv, cross_kv_scale, "L 2 B H E D")
    same_dtype("cross_kv", cross_kv, "kv", kv.dtype)
    shapes.tensor("cross_lengths", cross_lengths, "B", INT32)
    w = DecoderWeights.unflatten(
        weights,
        heads=shapes["H"],
        num_layers=shapes["L"],
        groups=groups,
        last_layer_only=last_layer_only,
        encoder_stride=encoder_stride,
    )
    shapes.sizes |= {"V": w.embed_tokens.shape[0], "H*D": shapes["H"] * shapes["D"]}
    shapes.tensor("weights[0] (embed_tokens)", w.embed_tokens, "V H*D", FLOATS)
    if kv_scale is None:
        same_dtype("weights[0] (embed_tokens)", w.embed_tokens, "kv", kv.dtype)
    if mask is not None:
        shapes.tensor("mask", mask, "V", FP32)
    integer("k", k, 1, K_INF)
    integer("eos", eos, -1, K_INF)
    integer("max_length", max_length, 1, min(shapes["N"], shapes["S"], w.positions))
    boolean("use_draft", use_draft)
    if use_draft and not w.blocks:
        raise ValueError("use_draft must be False without draft blocks among the weights, got True")
    check_drafts(draft_tokens, shapes["B"], use_draft)
    if first_mask is not None:
        shapes.tensor("first_mask", first_mask, "V", FP32)
        if rules is None:
            raise ValueError("rules must be given with first_mask, got None")
    if rules is not None:
        check_packed(shapes, rules)
    if log_probs is not None:
        shapes.tensor("log_probs", log_probs, "B N", FP32)


def check_drafts(draft_tokens: Tensor | None, batch: int, use_draft: bool) -> None:
    """Raise TypeError or ValueError unless they can be a step's drafts."""
    if draft_tokens is None:
        return
    shapes = Shapes(B=batch)
    shapes.tensor("draft_tokens", draft_tokens, "B G", INT32)
    integer("the number of draft_tokens of a row", shapes["G"], 0, MOST_DRAFTS)
    if use_draft:
        raise ValueError("use_draft must be False with draft_tokens, got True")


def composed(step: Callable[[DecoderWeights, StepState, StepRule], None]) -> Callable[..., None]:
    """The op's kernel from a step of named weights."""

    def decoder_step(
        kv: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        finished: Tensor,
        stats: Tensor,
        cross_kv: Tensor,
        cross_lengths: Tensor,
        weights: Sequence[Tensor],
        mask: Tensor | None,
        k: int,
        eos: int,
        max_length: int,
        use_draft: bool = True,
        groups: int = 0,
        last_layer_only: bool = False,
        encoder_stride: int = 1,
        kv_scale: Tensor | None = None,
        cross_kv_scale: Tensor | None = None,
        draft_tokens: Tensor | None = None,
        first_mask: Tensor | None = None,
        rules: Tensor | None = None,
        log_probs: Tensor | None = None,
    ) -> None:
        """One step of KVSPN decoding ("Parasitic dual-scale modelling", arXiv 2508.11189), all in place.

        Per unfinished row: the draft network guesses y'_{t+1} from the newest token y_t and the base model's
        own cache; the base model runs y_t and y'_{t+1} in one pass; the guess stands if its rank is under k;
        the lengths roll back what was rejected. Without a draft: one plain greedy step. The caller may give
        the guesses instead, up to 15 a row.

        Args:
            kv: [L, 2, B, H, S, D], fp32, bf16, fp16 or int8; the positions of this step are written.
            lengths, tokens, finished, stats: as in :func:`accept_and_rollback`.
            cross_kv: [L, 2, B, H, E, D] in kv's dtype, with cross_lengths int32 [B].
            weights: ``DecoderWeights.flatten()``, embeddings in kv's dtype unless that is int8.
            mask: fp32 [V], added to the logits of base model and draft network alike.
            k, eos, max_length: as in :func:`accept_and_rollback`; max_length is at most S and the number of
                positions too.
            use_draft: whether the draft network guesses.
            groups, last_layer_only, encoder_stride: as in ``DecoderWeights``.
            kv_scale, cross_kv_scale: fp32 [L, 2, B, H, S] and [L, 2, B, H, E], of int8 caches; kv_scale is
                written with kv.
            draft_tokens: int32 [B, 0 to 15], without use_draft: guesses of what follows each row's newest
                token, up to the first that is no token (below 0, or V and above).
            first_mask, rules: as in :func:`lm_head_verify`, for base model and draft network alike.
            log_probs: fp32 [B, N], written as in :func:`accept_and_rollback`.

        Raises:
            TypeError, ValueError: naming the argument, before anything is written.
        """
        w = DecoderWeights.unflatten(
            weights,
            heads=kv.shape[3],
            num_layers=kv.shape[0],
            groups=groups,
            last_layer_only=last_layer_only,
            encoder_stride=encoder_stride,
        )
        caches = Caches(kv, lengths, cross_kv, cross_lengths, kv_scale, cross_kv_scale)
        rule = StepRule(mask, k, eos, max_length, use_draft, draft_tokens, first_mask, rules, log_probs)
        step(w, StepState(caches, tokens, finished, stats), rule)

    return decoder_step


def step_rows(w: DecoderWeights, state: StepState, rule: StepRule, ops: Any = REFERENCE) -> None:
    """The step on named weights, unchecked: each unfinished row alone, as a batch of one."""
    for b, done in enumerate(state.finished.tolist()):
        if not done:
            step(ops, w, state.row(b), rule.row(b))


def step(ops: Any, w: DecoderWeights, state: StepState, rule: StepRule) -> None:
    """The step of all rows together, unchecked, composed from the ops of a backend; nothing is read back."""
    caches, tokens, finished, stats = state
    newest = tokens.gather(1, caches.lengths[:, None].long())
    draft = newest[:, :0]
    if rule.use_draft:
        draft = propose(w, newest, state, rule, ops)
    elif rule.draft_tokens is not None:
        draft = torch.where(rule.draft_tokens < len(w.embed_tokens), rule.draft_tokens, -1)
    x = base_pass(w, torch.cat([newest, draft], dim=1), caches, finished, ops)
    scores = None if rule.log_probs is None else rule.log_probs.new_empty(*x.shape[:2], 3)
    argmax, rank = ops.lm_head_verify(
        *(x, w.head.weight, draft, rule.mask, w.head.scale),
        **_norm(w.norm),
        **_choosing(rule, state),
        scores=scores,
    )
    ops.accept_and_rollback(
        *(tokens, caches.lengths, finished, stats, draft, argmax, rank, rule.k, rule.eos, rule.max_length),
        scores=scores,
        log_probs=rule.log_probs,
    )


def _choosing(rule: StepRule, state: StepState) -> dict[str, Tensor | None]:
    """What lm_head_verify is told of the rows' rules."""
    if rule.rules is None:
        return {}
    chosen = {"lengths": state.caches.lengths, "tokens": state.tokens}
    return {"first_mask": rule.first_mask, "rules": rule.rules, **chosen}


def base_pass(
    w: DecoderWeights, ids: Tensor, caches: Caches, finished: Tensor | None = None, ops: Any = REFERENCE
) -> Tensor:
    """Run tokens int32 [B, Q] at positions lengths[b] ... through the base model's layers.

    Appends their keys and values to ``kv``, but for rows that are finished; returns [B, Q, d], before the
    final norm.
    """
    kv, lengths, cross_kv, cross_lengths, kv_scale, cross_kv_scale, cross_queries = caches
    x = embed(w, ids, lengths)
    if cross_queries is not None:
        kept_at = _places(x, cross_queries, lengths)
    turned_by = angles(w, lengths, ids.shape[1])
    for i, layer in enumerate(w.layers):
        qkv = split_heads(linear(ops, x, layer.self_qkv, layer.self_norm), w.heads + 2 * w.key_heads)
        q, k, v = qkv.split([w.heads, w.key_heads, w.key_heads], dim=1)
        q, k = rotate(q, turned_by), rotate(k, turned_by)
        here = slice(i, i + 1)
        ops.append_kv(kv, k, v, lengths, i, finished, kv_scale)
        heads = ops.flat_kv_attention(q, kv[here], lengths, True, kv_scale=part(kv_scale, here))
        x = linear(ops, heads, layer.self_out, residual=x)
        if layer.cross_q is not None and layer.cross_out is not None:
            cross, scale = cross_kv[here], part(cross_kv_scale, here)
            queries = linear(ops, x, layer.cross_q, layer.cross_norm)
            if cross_queries is not None:
                cross_queries[i].scatter_(1, kept_at, queries.float())
            x = attend(ops, x, split_heads(queries, w.heads), layer.cross_out, cross, cross_lengths, scale)
        x = feed_forward(ops, w, x, layer)
    return x


def propose(
    w: DecoderWeights, newest: Tensor, state: StepState, rule: StepRule, ops: Any = REFERENCE
) -> Tensor:
    """The draft network's guess int32 [B, 1] of what follows the newest token int32 [B, 1]; -1: none."""
    kv, lengths, cross_kv, cross_lengths, kv_scale, cross_kv_scale, _ = state.caches
    width, turned_by = kv.shape[-1], angles(w, lengths, 1)
    x = embed(w, newest, lengths)
    if w.encoder_stride > 1:
        cross_lengths = (cross_lengths + (w.encoder_stride - 1)) // w.encoder_stride
    for i, block in enumerate(w.blocks):
        layers = w.group(i)
        scale = part(kv_scale, layers)
        queries = split_heads(linear(ops, x, block.kv_q, block.kv_norm), len(block.kv_q.weight) // width)
        x = attend(ops, x, rotate(queries, turned_by), block.kv_out, kv[layers], lengths, scale)
        if block.cross_norm and block.cross_q and block.cross_out:
            last = slice(layers.stop - 1, layers.stop)
            cross, scale = cross_kv[last], part(cross_kv_scale, last)
            queries = linear(ops, x, block.cross_q, block.cross_norm)
            heads = split_heads(queries, len(block.cross_q.weight) // width)
            x = attend(ops, x, heads, block.cross_out, cross, cross_lengths, scale)
        x = feed_forward(ops, w, x, block)
    head, none = w.draft_output, newest[:, :0]
    choice: Tensor = ops.lm_head_verify(
        *(x, head.weight, none, rule.mask, head.scale),
        **_norm(w.draft_norm),
        ids=w.draft_ids,
        **_choosing(rule, state),
    )[0]
    return choice


def embed(w: DecoderWeights, ids: Tensor, lengths: Tensor) -> Tensor:
    """Tokens int32 [B, Q] at positions lengths[b] ... -> [B, Q, d]; -1, no token, counts as 0."""
    x = F.embedding(ids.clamp(min=0), w.embed_tokens)
    if w.embed_positions is None:
        return x
    positions = _positions(lengths, ids.shape[1])
    positions = positions.clamp_(max=len(w.embed_positions) - 1)  # a draft past the end is never emitted
    return x + F.embedding(positions, w.embed_positions)


def _positions(lengths: Tensor, count: int) -> Tensor:
    """int32 [B, count]: lengths[b] ..."""
    return lengths[:, None] + torch.arange(count, dtype=torch.int32, device=lengths.device)


Angles = tuple[Tensor, Tensor] | None  # cosines and sines [B, 1, Q, D / 2]; None: positions are embedded


def angles(w: DecoderWeights, lengths: Tensor, count: int) -> Angles:
    """Those that heads at positions lengths[b] ... are turned by (arXiv 2104.09864); once a pass."""
    if not w.architecture.rotary_base:
        return None
    half = w.embed_tokens.shape[1] // w.heads // 2
    speeds = w.architecture.rotary_base ** (-torch.arange(half, device=lengths.device) / half)
    turns = _positions(lengths, count)[:, None, :, None] * speeds
    return turns.cos(), turns.sin()


def rotate(x: Tensor, by: Angles) -> Tensor:
    """Heads [B, H, Q, D], turned: the first half of a head's numbers with the second, as in transformers."""
    if by is None:
        return x
    cosines, sines = by
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1).to(x.dtype)


def attend(
    ops: Any, x: Tensor, queries: Tensor, out: Linear, kv: Tensor, lengths: Tensor, kv_scale: Tensor | None
) -> Tensor:
    """x [B, Q, d] plus the attention of queries [B, Hq, Q, D] to all the keys of ``kv``."""
    heads = ops.flat_kv_attention(queries, kv, lengths, False, kv_scale=kv_scale)
    return linear(ops, heads, out, residual=x)


def _places(x: Tensor, kept: Tensor, lengths: Tensor) -> Tensor:
    """Where a layer's [B, S + 1, d] keeps queries like x [B, Q, d]; its last takes what has no place.

    A finished row's are written too, past its length, where nothing is read.
    """
    positions = _positions(lengths, x.shape[1])
    return positions.clamp_(max=kept.shape[2] - 1).long()[..., None].expand_as(x)


def feed_forward(ops: Any, w: DecoderWeights, x: Tensor, part: LayerWeights | DraftBlockWeights) -> Tensor:
    """x [B, Q, d] plus its feed-forward."""
    if not w.architecture.gated:
        inner = linear(ops, x, part.fc1, part.ffn_norm, gelu=True)
    else:
        gate, other = linear(ops, x, part.fc1, part.ffn_norm).chunk(2, dim=-1)
        inner = F.silu(gate) * other
    return linear(ops, inner, part.fc2, residual=x)


def fitted(ops: Any, architecture: Architecture) -> Any:
    """The ops with the norms of an architecture: an RMSNorm, which is none of theirs, goes in front."""
    if architecture == WHISPER:
        return ops

    def with_norm(op: Callable[..., Any]) -> Callable[..., Any]:
        def normed(x: Tensor, *args: Any, norm_weight: Tensor | None = None, **rest: Any) -> Any:
            if architecture.rms_norm and norm_weight is not None:
                x = F.rms_norm(x, x.shape[-1:], norm_weight.to(x.dtype), architecture.norm_eps)
                norm_weight = None
            return op(x, *args, norm_weight=norm_weight, eps=architecture.norm_eps, **rest)

        return normed

    with_norms = {name: with_norm(getattr(ops, name)) for name in ("fused_linear", "lm_head_verify")}
    return SimpleNamespace(**{**vars(ops), **with_norms})


def _norm(norm: Norm | None) -> dict[str, Tensor | None]:
    """A norm as the ops take it."""
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias}


def linear(
    ops: Any,
    x: Tensor,
    w: Linear,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """fused_linear on named weights."""
    result: Tensor = ops.fused_linear(
        x, w.weight, w.bias, **_norm(norm), gelu=gelu, residual=residual, scale=w.scale
    )
    return result


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Q, heads * D] -> a view [B, heads, Q, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


reference = composed(step_rows)
decoder_step = register(
    "decoder_step(Tensor(a!) kv, Tensor(b!) lengths, Tensor(c!) tokens, Tensor(d!) finished, "
    "Tensor(e!) stats, Tensor cross_kv, Tensor cross_lengths, Tensor[] weights, Tensor? mask, "
    "int k, int eos, int max_length, bool use_draft=True, int groups=0, bool last_layer_only=False, "
    "int encoder_stride=1, Tensor(f!)? kv_scale=None, Tensor? cross_kv_scale=None, "
    "Tensor? draft_tokens=None, Tensor? first_mask=None, Tensor? rules=None, "
    "Tensor(g!)? log_probs=None) -> ()",
    check=check,
    fake=lambda *args, **kwargs: None,
    reference=reference,
)
