"""StepCache: the keys and values of a decoding batch, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvspn.checks import FLOATS, INT32, Shapes, integer, same_dtype
from kvspn.ops import compact_kv
from kvspn.ops.append_kv import quantise
from kvspn.ops.decoder_step import Caches


def draft_first(states: Tensor, stride: int) -> Tensor:
    """Encoder states [E, d] in the order of the cache: 0, n, 2n, ..., then 1, n + 1, ... for a stride of n.

    To attention an order is nothing; a draft network that attends to every n-th has them in one piece.
    """
    return torch.cat([states[first::stride] for first in range(min(stride, len(states)))])


class StepCache:
    """One contiguous tensor for all decoder layers, and the encoder's keys and values beside it.

    kv: [L, 2, B, H, S, D], keys then values; lengths: int32 [B], the valid positions of each row.
    cross_kv: [L, 2, B, H, E, D], written once per utterance; cross_lengths: int32 [B].
    kv_scale, cross_kv_scale: fp32 [L, 2, B, H, S] and [L, 2, B, H, E], of int8 caches, else None: a position
    of a head is its int8 values times its scale (see :func:`kvspn.ops.append_kv.quantise`).
    A decoder without an encoder has a cross_capacity of 0.
    cross_queries: fp32 [L, B, S + 1, H * D] once :meth:`keep_queries` has been called, else None: the queries
    of cross-attention of each token that was processed, at its position.

    No address changes after creation, and what lies past the lengths is never read: fresh buffers hold
    anything. Rolling back moves lengths alone.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        cross_capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "capacity": capacity,
            "cross_capacity": cross_capacity,
        }
        for name, size in sizes.items():
            integer(name, size, name != "cross_capacity", 2**31 - 1)
        if dtype not in (*FLOATS, torch.int8):
            raise TypeError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype}")
        # Ordinary tensors even when made in inference mode: those could not change outside of it.
        with torch.inference_mode(False):
            shape = (num_layers, 2, batch, heads, capacity)
            cross = (num_layers, 2, batch, heads, cross_capacity)
            self.kv = torch.empty(*shape, head_dim, dtype=dtype, device=device)
            self.cross_kv = torch.empty(*cross, head_dim, dtype=dtype, device=device)
            scaled = dtype == torch.int8
            self.kv_scale = torch.empty(shape, device=device) if scaled else None
            self.cross_kv_scale = torch.empty(cross, device=device) if scaled else None
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.cross_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.cross_queries: Tensor | None = None
        self._cross_written = [False] * batch

    def keep_queries(self) -> bool:
        """Make room for the queries of cross-attention; whether there was none before."""
        if self.cross_queries is not None:
            return False
        layers, _, batch, heads, capacity, width = self.kv.shape
        with torch.inference_mode(False):
            shape = (layers, batch, capacity + 1, heads * width)
            self.cross_queries = torch.empty(shape, device=self.kv.device)
        return True

    @property
    def tensors(self) -> Caches:
        """What a step works on."""
        return Caches(
            *(self.kv, self.lengths, self.cross_kv, self.cross_lengths),
            *(self.kv_scale, self.cross_kv_scale, self.cross_queries),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.tensors if buffer is not None)

    def group(self, g: int, groups: int) -> Tensor:
        """The g-th of ``groups`` groups of consecutive layers: a view [L/groups, 2, B, H, S, D]."""
        integer("groups", groups, 1, len(self.kv))
        if len(self.kv) % groups:
            raise ValueError(f"groups must divide the {len(self.kv)} layers, got {groups}")
        integer("g", g, 0, groups - 1)
        size = len(self.kv) // groups
        return self.kv[g * size : (g + 1) * size]

    def write_cross(self, row: int, kv: Tensor) -> None:
        """Write the encoder's keys and values [L, 2, H, E_b, D] of one row: once until :meth:`reset`.

        In the cache's dtype; fp32, bf16 or fp16 to an int8 cache.
        """
        layers, _, batch, heads, capacity, width = self.cross_kv.shape
        integer("row", row, 0, batch - 1)
        shapes = Shapes(L=layers, H=heads, D=width)
        shapes.tensor("kv", kv, "L 2 H E D", FLOATS)
        if self.cross_kv_scale is None:
            same_dtype("kv", kv, "the cache", self.kv.dtype)
        if shapes["E"] > capacity:
            raise ValueError(f"kv must hold at most {capacity} positions, got {shapes['E']}")
        if self._cross_written[row]:
            raise ValueError(
                f"row must not be written yet, got {row}: its cross-attention KV is; reset() first"
            )
        self._cross_written[row] = True
        if self.cross_kv_scale is not None:
            kv, self.cross_kv_scale[:, :, row, :, : shapes["E"]] = quantise(kv)
        self.cross_kv[:, :, row, :, : shapes["E"]] = kv
        self.cross_lengths[row] = shapes["E"]

    def copy_cross(self, source: int, row: int) -> None:
        """Give a row the encoder's keys and values that another one has, of the same utterance."""
        for buffer in (self.cross_kv, self.cross_kv_scale):
            if buffer is not None:
                buffer[:, :, row] = buffer[:, :, source]
        self.cross_lengths[row] = self.cross_lengths[source]
        self._cross_written[row] = True

    def rollback(self, lengths: Tensor) -> None:
        """Shorten each row to lengths[b] (int32 [B]) positions; nothing is copied, zeroed or waited for.

        A row is never lengthened: where lengths[b] is more than the row holds, the row stays as it is.
        """
        shapes = Shapes()
        shapes.tensor("the cache's lengths", self.lengths, "B", INT32)
        shapes.tensor("lengths", lengths, "B", INT32)
        self.lengths.copy_(torch.minimum(self.lengths, lengths).clamp_(min=0))

    def reorder(self, beam_index: Tensor) -> None:
        """Row b becomes what row beam_index[b] (int32 or int64 [B]) was, for beam search.

        Cross-attention KV stays: beam_index must keep to rows of the same utterance.
        """
        shapes = Shapes()
        shapes.tensor("the cache's lengths", self.lengths, "B", INT32)
        shapes.tensor("beam_index", beam_index, "B", (torch.int32, torch.int64))
        on_host = beam_index.device.type == "cpu"
        if on_host and not all(0 <= row < shapes["B"] for row in beam_index.tolist()):
            raise ValueError(f"beam_index must hold rows 0..{shapes['B'] - 1}, got {beam_index.tolist()}")
        lengths = self.lengths[beam_index]
        positions = torch.arange(self.kv.shape[4], dtype=torch.int32, device=self.kv.device)
        source = torch.where(positions < lengths[:, None], positions, -1)
        compact_kv(self.kv, beam_index.int(), source, torch.zeros_like(lengths), self.kv_scale)
        if self.cross_queries is not None:
            self.cross_queries.copy_(self.cross_queries[:, beam_index])
        self.lengths.copy_(lengths)

    def reset(self) -> None:
        """Forget everything, for the next utterances."""
        self.lengths.zero_()
        self.cross_lengths.zero_()
        self._cross_written = [False] * len(self._cross_written)
