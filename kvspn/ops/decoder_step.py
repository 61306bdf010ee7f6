"""decoder_step: draft, verify, accept and roll back: one step of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

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
from kvspn.weights import DecoderWeights, Linear, Norm

REFERENCE = SimpleNamespace(
    append_kv=append_kv,
    flat_kv_attention=flat_kv_attention,
    fused_linear=fused_linear,
    lm_head_verify=lm_head_verify,
    accept_and_rollback=accept_and_rollback,
)
"""The ops that a step is composed of; a backend brings its own by these names."""

_ALL = (slice(None), slice(None))  # layers, and keys and values alike


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
    integer("max_length", max_length, 1, min(shapes["N"], shapes["S"], w.embed_positions.shape[0]))
    boolean("use_draft", use_draft)
    if use_draft and not w.blocks:
        raise ValueError("use_draft must be False without draft blocks among the weights, got True")


def reference(
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
) -> None:
    """One step of KVSPN decoding ("Parasitic dual-scale modelling", arXiv 2508.11189), all in place.

    Per unfinished row: the draft network guesses y'_{t+1} from the newest token y_t and the base model's
    own cache; the base model runs y_t and y'_{t+1} in one pass; the guess stands if its rank is under k;
    the lengths roll back what was rejected. Without a draft: one plain greedy step.

    Args:
        kv: [L, 2, B, H, S, D], fp32, bf16, fp16 or int8; the positions of this step are written.
        lengths, tokens, finished, stats: as in :func:`accept_and_rollback`.
        cross_kv: [L, 2, B, H, E, D] in kv's dtype, with cross_lengths int32 [B].
        weights: ``DecoderWeights.flatten()``, embeddings in kv's dtype unless that is int8.
        mask: fp32 [V], added to the logits of base model and draft network alike.
        k, eos, max_length: as in :func:`accept_and_rollback`; max_length is at most S and the number of
            positions too.
        use_draft: False for a plain greedy step.
        groups, last_layer_only, encoder_stride: as in ``DecoderWeights``.
        kv_scale, cross_kv_scale: fp32 [L, 2, B, H, S] and [L, 2, B, H, E], of int8 caches; kv_scale is
            written with kv.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    w = named(weights, kv, groups, last_layer_only, encoder_stride)
    step_rows(
        w, kv, lengths, tokens, finished, stats, cross_kv, cross_lengths, mask, k, eos, max_length, use_draft,
        kv_scale, cross_kv_scale,
    )  # fmt: skip


def named(
    weights: Sequence[Tensor], kv: Tensor, groups: int, last_layer_only: bool, encoder_stride: int
) -> DecoderWeights:
    """The op's flat weights, for a cache [L, 2, B, H, S, D]."""
    return DecoderWeights.unflatten(
        weights,
        heads=kv.shape[3],
        num_layers=kv.shape[0],
        groups=groups,
        last_layer_only=last_layer_only,
        encoder_stride=encoder_stride,
    )


def step_rows(
    w: DecoderWeights,
    kv: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    finished: Tensor,
    stats: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    mask: Tensor | None,
    k: int,
    eos: int,
    max_length: int,
    use_draft: bool,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
) -> None:
    """The step on named weights, unchecked: each unfinished row alone, as a batch of one."""
    for b, done in enumerate(finished.tolist()):
        if done:
            continue
        row = slice(b, b + 1)
        step(
            REFERENCE,
            w,
            kv[:, :, row],
            lengths[row],
            tokens[row],
            finished[row],
            stats[row],
            cross_kv[:, :, row],
            cross_lengths[row],
            mask,
            k,
            eos,
            max_length,
            use_draft,
            part(kv_scale, *_ALL, row),
            part(cross_kv_scale, *_ALL, row),
        )


def step(
    ops: Any,
    w: DecoderWeights,
    kv: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    finished: Tensor,
    stats: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    mask: Tensor | None,
    k: int,
    eos: int,
    max_length: int,
    use_draft: bool,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
) -> None:
    """The step of all rows together, unchecked, composed from the ops of a backend; nothing is read back."""
    newest = tokens.gather(1, lengths[:, None].long())
    draft = newest[:, :0]
    if use_draft:
        draft = propose(w, newest, kv, lengths, cross_kv, cross_lengths, mask, ops, kv_scale, cross_kv_scale)
    ids = torch.cat([newest, draft], dim=1)
    x = base_pass(w, ids, kv, lengths, cross_kv, cross_lengths, finished, ops, kv_scale, cross_kv_scale)
    argmax, rank = ops.lm_head_verify(x, w.head.weight, draft, mask, w.head.scale, *w.norm)
    ops.accept_and_rollback(tokens, lengths, finished, stats, draft, argmax, rank, k, eos, max_length)


def composed(ops: Any) -> Callable[..., None]:
    """The op's kernel from the ops of a backend, which take all rows together."""

    def kernel(
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
    ) -> None:
        w = named(weights, kv, groups, last_layer_only, encoder_stride)
        state = kv, lengths, tokens, finished, stats, cross_kv, cross_lengths
        step(ops, w, *state, mask, k, eos, max_length, use_draft, kv_scale, cross_kv_scale)

    return kernel


def base_pass(
    w: DecoderWeights,
    ids: Tensor,
    kv: Tensor,
    lengths: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    finished: Tensor | None = None,
    ops: Any = REFERENCE,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
) -> Tensor:
    """Run tokens int32 [B, Q] at positions lengths[b] ... through the base model's layers.

    Appends their keys and values to ``kv``, but for rows that are finished; returns [B, Q, d], before the
    final LayerNorm.
    """
    x = embed(w, ids, lengths)
    for i, layer in enumerate(w.layers):
        q, k, v = split_heads(linear(ops, x, layer.self_qkv, layer.self_norm), 3, w.heads)
        here = slice(i, i + 1)
        ops.append_kv(kv, k, v, lengths, i, finished, kv_scale)
        heads = ops.flat_kv_attention(q, kv[here], lengths, True, kv_scale=part(kv_scale, here))
        x = linear(ops, heads, layer.self_out, residual=x)
        cross, scale = cross_kv[here], part(cross_kv_scale, here)
        x = attend(ops, x, layer.cross_norm, layer.cross_q, layer.cross_out, cross, cross_lengths, scale)
        x = feed_forward(ops, x, layer.ffn_norm, layer.fc1, layer.fc2)
    return x


def propose(
    w: DecoderWeights,
    newest: Tensor,
    kv: Tensor,
    lengths: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    mask: Tensor | None,
    ops: Any = REFERENCE,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
) -> Tensor:
    """The draft network's guess int32 [B, 1] of what follows the newest token int32 [B, 1]; -1: none."""
    x = embed(w, newest, lengths)
    if w.encoder_stride > 1:
        cross_lengths = (cross_lengths + (w.encoder_stride - 1)) // w.encoder_stride
    for i, block in enumerate(w.blocks):
        layers = w.group(i)
        scale = part(kv_scale, layers)
        x = attend(ops, x, block.kv_norm, block.kv_q, block.kv_out, kv[layers], lengths, scale)
        if block.cross_norm and block.cross_q and block.cross_out:
            last = slice(layers.stop - 1, layers.stop)
            cross, scale = cross_kv[last], part(cross_kv_scale, last)
            x = attend(ops, x, block.cross_norm, block.cross_q, block.cross_out, cross, cross_lengths, scale)
        x = feed_forward(ops, x, block.ffn_norm, block.fc1, block.fc2)
    if mask is not None and w.draft_ids is not None:
        mask = mask[w.draft_ids]
    head, norm = w.draft_output, w.draft_norm or (None, None)
    choice, _ = ops.lm_head_verify(x, head.weight, newest[:, :0], mask, head.scale, *norm)
    return choice if w.draft_ids is None else torch.where(choice < 0, choice, w.draft_ids[choice])


def embed(w: DecoderWeights, ids: Tensor, lengths: Tensor) -> Tensor:
    """Tokens int32 [B, Q] at positions lengths[b] ... -> [B, Q, d]; -1, no token, counts as 0."""
    positions = lengths[:, None] + torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    positions = positions.clamp_(max=len(w.embed_positions) - 1)  # a draft past the end is never emitted
    return F.embedding(ids.clamp(min=0), w.embed_tokens) + F.embedding(positions, w.embed_positions)


def attend(
    ops: Any,
    x: Tensor,
    norm: Norm,
    q: Linear,
    out: Linear,
    kv: Tensor,
    lengths: Tensor,
    kv_scale: Tensor | None,
) -> Tensor:
    """x [B, Q, d] plus its attention to all the keys of ``kv``."""
    (query,) = split_heads(linear(ops, x, q, norm), 1, q.weight.shape[0] // kv.shape[-1])
    heads = ops.flat_kv_attention(query, kv, lengths, False, kv_scale=kv_scale)
    return linear(ops, heads, out, residual=x)


def feed_forward(ops: Any, x: Tensor, norm: Norm, fc1: Linear, fc2: Linear) -> Tensor:
    """x [B, Q, d] plus its feed-forward."""
    return linear(ops, linear(ops, x, fc1, norm, gelu=True), fc2, residual=x)


def linear(
    ops: Any,
    x: Tensor,
    w: Linear,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """fused_linear on named weights."""
    norm_weight, norm_bias = norm or (None, None)
    result: Tensor = ops.fused_linear(
        x, w.weight, w.bias, norm_weight, norm_bias, gelu=gelu, residual=residual, scale=w.scale
    )
    return result


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, Q, parts * heads * D] -> ``parts`` views [B, heads, Q, D]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


decoder_step = register(
    "decoder_step(Tensor(a!) kv, Tensor(b!) lengths, Tensor(c!) tokens, Tensor(d!) finished, "
    "Tensor(e!) stats, Tensor cross_kv, Tensor cross_lengths, Tensor[] weights, Tensor? mask, "
    "int k, int eos, int max_length, bool use_draft=True, int groups=0, bool last_layer_only=False, "
    "int encoder_stride=1, Tensor(f!)? kv_scale=None, Tensor? cross_kv_scale=None) -> ()",
    check=check,
    fake=lambda *args, **kwargs: None,
    reference=reference,
)
