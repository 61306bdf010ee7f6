"""append_kv: write the keys and values of new positions into the cache."""

from __future__ import annotations

from torch import Tensor

from kvspn.ops._checks import BOOL, FLOATS, INT32, Shapes, integer, same_dtype
from kvspn.ops._library import register


def check(
    kv: Tensor, k: Tensor, v: Tensor, lengths: Tensor, layer: int, finished: Tensor | None = None
) -> None:
    shapes = Shapes()
    shapes.tensor("kv", kv, "L 2 B H S D", FLOATS)
    for name, value in (("k", k), ("v", v)):
        shapes.tensor(name, value, "B H Q D", FLOATS)
        same_dtype(name, value, "kv", kv.dtype)
    shapes.tensor("lengths", lengths, "B", INT32)
    integer("layer", layer, 0, shapes["L"] - 1)
    if finished is not None:
        shapes.tensor("finished", finished, "B", BOOL)


def reference(
    kv: Tensor, k: Tensor, v: Tensor, lengths: Tensor, layer: int, finished: Tensor | None = None
) -> None:
    """Write the K and V of Q new positions of one layer at ``lengths[b] ...``; ``lengths`` does not move.

    Args:
        kv: the cache [L, 2, B, H, S, D], fp32, bf16 or fp16; changed in place.
        k, v: [B, H, Q, D] in kv's dtype.
        lengths: int32 [B], valid positions of each row. Positions outside 0 .. S-1 are dropped.
        layer: 0 .. L-1.
        finished: bool [B]; rows that are True stay untouched.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    capacity, count = kv.shape[4], k.shape[2]
    skip = [False] * kv.shape[2] if finished is None else finished.tolist()
    for b, length in enumerate(lengths.tolist()):
        first, end = max(length, 0), min(length + count, capacity)
        if first < end and not skip[b]:
            kv[layer, 0, b, :, first:end] = k[b, :, first - length : end - length]
            kv[layer, 1, b, :, first:end] = v[b, :, first - length : end - length]


append_kv = register(
    "append_kv(Tensor(a!) kv, Tensor k, Tensor v, Tensor lengths, int layer, Tensor? finished=None) -> ()",
    check=check,
    fake=lambda kv, k, v, lengths, layer, finished=None: None,
    reference=reference,
)
