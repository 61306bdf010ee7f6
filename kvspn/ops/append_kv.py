"""append_kv: write the keys and values of new positions into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.checks import BOOL, FLOATS, INT32, Shapes, integer, same_dtype
from kvspn.ops._library import register


def check(
    kv: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    layer: int,
    finished: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> None:
    shapes = Shapes()
    shapes.cache("kv", kv, kv_scale, "L 2 B H S D")
    for name, value in (("k", k), ("v", v)):
        shapes.tensor(name, value, "B H Q D", FLOATS)
        if kv_scale is None:
            same_dtype(name, value, "kv", kv.dtype)
    shapes.tensor("lengths", lengths, "B", INT32)
    integer("layer", layer, 0, shapes["L"] - 1)
    if finished is not None:
        shapes.tensor("finished", finished, "B", BOOL)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and fp32 scales [...]: round(127 x / max|x|) and max|x| / 127.

    Halves are rounded to even. NaN or infinity makes the scale not finite, and so all that is read of it.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    limit = torch.full_like(largest, 127)  # by or of a number, torch may round twice
    values = (x * (limit / largest)[..., None]).nan_to_num(0, 0, 0).round()
    return values.to(torch.int8), largest / limit


def reference(
    kv: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    layer: int,
    finished: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> None:
    """Write the K and V of Q new positions of one layer at ``lengths[b] ...``; ``lengths`` does not move.

    Args:
        kv: the cache [L, 2, B, H, S, D], fp32, bf16, fp16 or int8; changed in place.
        k, v: [B, H, Q, D] in kv's dtype; fp32, bf16 or fp16 to an int8 cache.
        lengths: int32 [B], valid positions of each row. Positions outside 0 .. S-1 are dropped.
        layer: 0 .. L-1.
        finished: bool [B]; rows that are True stay untouched.
        kv_scale: fp32 [L, 2, B, H, S], of an int8 cache; changed in place. See :func:`quantise`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    capacity, count = kv.shape[4], k.shape[2]
    skip = [False] * kv.shape[2] if finished is None else finished.tolist()
    for b, length in enumerate(lengths.tolist()):
        first, end = max(length, 0), min(length + count, capacity)
        if first < end and not skip[b]:
            for part, x in enumerate((k, v)):
                new = x[b, :, first - length : end - length]
                if kv_scale is not None:
                    new, kv_scale[layer, part, b, :, first:end] = quantise(new)
                kv[layer, part, b, :, first:end] = new


append_kv = register(
    "append_kv(Tensor(a!) kv, Tensor k, Tensor v, Tensor lengths, int layer, Tensor? finished=None, "
    "Tensor(b!)? kv_scale=None) -> ()",
    check=check,
    fake=lambda kv, k, v, lengths, layer, finished=None, kv_scale=None: None,
    reference=reference,
)
