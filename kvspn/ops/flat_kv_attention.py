"""flat_kv_attention: attention to the caches of several layers as one sequence of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.checks import FLOATS, INT32, Shapes, boolean, number, same_dtype
from kvspn.ops._library import register


def check(
    q: Tensor,
    kv: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None = None,
    tail: Tensor | None = None,
    tail_lengths: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> None:
    shapes = Shapes()
    shapes.cache("kv", kv, kv_scale, "n 2 B H S D")
    shapes.tensor("q", q, "B Hq Q D", FLOATS)
    if kv_scale is None:
        same_dtype("q", q, "kv", kv.dtype)
    if shapes["n"] < 1:
        raise ValueError("kv must hold at least one layer, got 0")
    if shapes["H"] < 1 or shapes["Hq"] % shapes["H"]:
        raise ValueError(f"q must have a multiple of kv's {shapes['H']} heads, got {shapes['Hq']}")
    shapes.tensor("lengths", lengths, "B", INT32)
    boolean("causal", causal)
    if scale is not None:
        number("scale", scale)
    if (tail is None) != (tail_lengths is None):
        missing = "tail" if tail is None else "tail_lengths"
        raise ValueError(
            f"{missing} must be given with its counterpart, got None: tail and tail_lengths go together"
        )
    if tail is not None:
        if kv_scale is not None:
            raise ValueError("tail must be None beside an int8 kv, got a tensor")
        shapes.tensor("tail", tail, "2 B H S' D", FLOATS)
        same_dtype("tail", tail, "kv", kv.dtype)
        shapes.tensor("tail_lengths", tail_lengths, "B", INT32)


def reference(
    q: Tensor,
    kv: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None = None,
    tail: Tensor | None = None,
    tail_lengths: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Q queries over the keys of n layers x T_b positions under one softmax, and an optional tail.

    One kernel, three uses: n = 1 and causal is the base model's self-attention, n = 1 and not causal its
    cross-attention, n > 1 the cross-model attention of KVSPN ("Parasitic dual-scale modelling",
    arXiv 2508.11189): the keys of a group's layers flattened into one sequence, likewise the values.

    Args:
        q: [B, Hq, Q, D], fp32, bf16 or fp16. Hq is a multiple of H; query head h reads key head h * H // Hq.
        kv: [n, 2, B, H, S, D] in q's dtype, or int8: a slice of the cache.
        lengths: int32 [B]. Row b sees T_b = lengths[b] positions of each layer; if causal, query i sees
            lengths[b] + i + 1, the Q queries' own positions being appended already. T_b is kept in 0 .. S.
        causal: see lengths.
        scale: factor on the scores, D ** -0.5 if None.
        tail: [2, B, H, S', D], further keys and values that every query sees (the draft's own); none beside
            an int8 cache.
        tail_lengths: int32 [B], valid positions of the tail, kept in 0 .. S'.
        kv_scale: fp32 [n, 2, B, H, S], of an int8 cache, whose keys and values are kv times it.

    Returns:
        [B, Q, Hq * D] in q's dtype: scores, softmax and sum in fp32, rounded once. A query without keys
        gives zeros. What lies past the valid lengths is never read.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
    """
    batch, heads, queries, width = q.shape
    kv_heads, capacity = kv.shape[3:5]
    scale = width**-0.5 if scale is None else scale
    tails = [0] * batch if tail_lengths is None else tail_lengths.tolist()
    out = q.new_zeros(batch, queries, heads, width)
    for b, length in enumerate(lengths.tolist()):
        for i in range(queries):
            if causal or i == 0:
                valid = min(max(length + (i + 1 if causal else 0), 0), capacity)
                flat = _fresh(kv[:, :, b, :, :valid].permute(1, 2, 0, 3, 4)).flatten(2, 3)
                if kv_scale is not None:
                    flat *= kv_scale[:, :, b, :, :valid].permute(1, 2, 0, 3).flatten(2)[..., None]
                if tail is not None:
                    flat = torch.cat([flat, _fresh(tail[:, b, :, : max(tails[b], 0)])], dim=2)
                keys, values = flat if heads == kv_heads else flat.repeat_interleave(heads // kv_heads, dim=1)
            if keys.shape[1]:
                query = _fresh(q[b, :, i, None])
                weights = torch.softmax(query @ keys.transpose(1, 2) * scale, dim=-1)
                out[b, i] = (weights @ values).squeeze(1)
    return out.flatten(2)


def _fresh(x: Tensor) -> Tensor:
    """An fp32 copy: what follows depends neither on the strides nor on the alignment of ``x``."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def fake(
    q: Tensor,
    kv: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None = None,
    tail: Tensor | None = None,
    tail_lengths: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


flat_kv_attention = register(
    "flat_kv_attention(Tensor q, Tensor kv, Tensor lengths, bool causal, float? scale=None, "
    "Tensor? tail=None, Tensor? tail_lengths=None, Tensor? kv_scale=None) -> Tensor",
    check=check,
    fake=fake,
    reference=reference,
)
