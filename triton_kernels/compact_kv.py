"""compact_kv: all reads into a workspace, then all writes, so that source and target may overlap."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvspn.triton_kernels.launch import launch, register


@triton.jit
def compact_kv_kernel(
    kv, held, rows, source, start,
    batch, moves, capacity, source_stride, kv_n, kv_part, kv_b, kv_h, kv_s,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One move of one row in one layer's keys or values, for every head in turn."""
    b = tl.program_id(0) // moves
    m = tl.program_id(0) % moves
    plane = tl.program_id(1)  # layer * 2 + (0 for keys, 1 for values)
    row = tl.load(rows + b)
    read = tl.load(source + b * source_stride + m)
    write = tl.load(start + b) + m
    moved = (row >= 0) & (row < batch) & (read >= 0) & (read < capacity) & (write >= 0) & (write < capacity)
    d = tl.arange(0, BLOCK_D)
    inside = d < tl.where(moved, D, 0)
    cache = kv + (plane // 2).to(tl.int64) * kv_n + (plane % 2).to(tl.int64) * kv_part + d
    for h in range(HEADS):
        kept = held + (((plane.to(tl.int64) * batch + b) * moves + m) * HEADS + h) * D + d
        if WRITE:
            target = cache + b.to(tl.int64) * kv_b + write.to(tl.int64) * kv_s + h * kv_h
            tl.store(target, tl.load(kept, mask=inside), mask=inside)
        else:
            origin = cache + row.to(tl.int64) * kv_b + read.to(tl.int64) * kv_s + h * kv_h
            tl.store(kept, tl.load(origin, mask=inside), mask=inside)


def launch_compact_kv(
    kv: Tensor, rows: Tensor, source: Tensor, start: Tensor, kv_scale: Tensor | None = None
) -> None:
    """As :func:`kvspn.ops.compact_kv`, unchecked."""
    if kv_scale is not None:
        launch_compact_kv(kv_scale[..., None], rows, source, start)
    layers, _, batch, heads, capacity, width = kv.shape
    moves = source.shape[1]
    held = kv.new_empty(layers, 2, batch, moves, heads, width)
    for write in (False, True):
        launch(
            compact_kv_kernel,
            (batch * moves, layers * 2),
            *(kv, held, rows, source, start),
            *(batch, moves, capacity, source.stride(0), *kv.stride()[:5]),
            HEADS=heads,
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            WRITE=write,
            num_warps=1,
        )


compact_kv = register("compact_kv", launch_compact_kv)
