"""compact_kv: gather positions and rows inside the cache."""

from __future__ import annotations

from torch import Tensor

from kvspn.checks import INT32, Shapes
from kvspn.ops._library import register


def check(kv: Tensor, rows: Tensor, source: Tensor, start: Tensor, kv_scale: Tensor | None = None) -> None:
    shapes = Shapes()
    shapes.cache("kv", kv, kv_scale, "L 2 B H S D")
    shapes.tensor("rows", rows, "B", INT32)
    shapes.tensor("source", source, "B M", INT32)
    shapes.tensor("start", start, "B", INT32)


def reference(
    kv: Tensor, rows: Tensor, source: Tensor, start: Tensor, kv_scale: Tensor | None = None
) -> None:
    """Position start[b] + m of row b takes what position source[b, m] of row rows[b] held before the call.

    In every layer, keys and values alike. All reads come before all writes, so sources and targets may
    overlap. For a tree of drafts, rows[b] = b, start = lengths and source names the accepted nodes'
    positions; for beams, rows names the parents, start = 0 and source = 0, 1, 2 ... . Lengths do not move.

    Args:
        kv: the cache [L, 2, B, H, S, D], fp32, bf16, fp16 or int8; changed in place.
        rows: int32 [B]. source: int32 [B, M]. start: int32 [B].
            A move with an index outside the cache, at its source or target, is left out: -1 in source pads.
        kv_scale: fp32 [L, 2, B, H, S], of an int8 cache; moved with it.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    capacity = kv.shape[4]
    moves = []
    for b, (row, first) in enumerate(zip(rows.tolist(), start.tolist(), strict=True)):
        if not 0 <= row < len(rows):
            continue
        pairs = [(p, first + m) for m, p in enumerate(source[b].tolist())]
        pairs = [(p, t) for p, t in pairs if 0 <= p < capacity and 0 <= t < capacity]
        read, write = [p for p, _ in pairs], [t for _, t in pairs]
        for buffer in (kv,) if kv_scale is None else (kv, kv_scale):
            moves.append((buffer, b, write, buffer[:, :, row, :, read]))
    for buffer, b, write, held in moves:
        buffer[:, :, b, :, write] = held


compact_kv = register(
    "compact_kv(Tensor(a!) kv, Tensor rows, Tensor source, Tensor start, Tensor(b!)? kv_scale=None) -> ()",
    check=check,
    fake=lambda kv, rows, source, start, kv_scale=None: None,
    reference=reference,
)
