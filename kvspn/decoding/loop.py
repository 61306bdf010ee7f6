"""Greedy and speculative decoding: the loop around an engine's step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvspn.checks import integer
from kvspn.decoding.statistics import DecodeStats
from kvspn.engines import Engine
from kvspn.ops import K_INF

Streamer = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class DecodeResult:
    """sequences: per row its token ids, prompt and eos included. rows: their figures. total: the batch's."""

    sequences: list[list[int]]
    rows: list[DecodeStats]
    total: DecodeStats


def parse_k(k: int | float | str) -> int:
    """An int >= 1, math.inf or "inf" -> the ops' k."""
    if k in (math.inf, "inf"):
        return K_INF
    integer("k", k, 1, K_INF)
    return int(k)


def decode(
    engine: Engine,
    encoder_states: Sequence[Tensor],
    prompt: Sequence[Sequence[int]],
    *,
    eos: int,
    max_length: int,
    k: int | float | str = 1,
    draft: bool = True,
    mask: Tensor | None = None,
    begin_mask: Tensor | None = None,
    streamer: Streamer | None = None,
) -> DecodeResult:
    """Decode one batch until every row has ended.

    With k = 1 the tokens are exactly those of ``draft=False``, plain greedy decoding of the base model.

    Args:
        engine: its batch is the number of rows here.
        encoder_states, prompt, eos, max_length, mask, begin_mask: as in :meth:`Engine.start`.
        k: a drafted token stands if it is among the base model's k best; an int >= 1, math.inf or "inf".
        draft: False for plain greedy decoding.
        streamer: called as streamer(row, new_token_ids) after each step for each row that grew. For a
            TextStreamer of transformers and a batch of one, pass
            ``lambda row, ids: text_streamer.put(torch.tensor(ids))`` and call its ``end()`` afterwards.

    Raises:
        TypeError, ValueError: naming the argument, before any step runs.
    """
    accept = parse_k(k)
    engine.start(encoder_states, prompt, eos=eos, max_length=max_length, mask=mask, begin_mask=begin_mask)
    finished = engine.finished.tolist()
    counts = [len(ids) for ids in prompt]
    seconds = [0.0] * len(counts)
    begin = time.perf_counter()
    while not all(finished):
        engine.step(accept, draft)
        grown = [length + 1 for length in engine.lengths.tolist()]
        now = time.perf_counter() - begin
        for row, (old, new) in enumerate(zip(counts, grown, strict=True)):
            if new > old:
                seconds[row] = now
                if streamer is not None:
                    streamer(row, engine.tokens[row, old:new].tolist())
        counts, finished = grown, engine.finished.tolist()
    elapsed = max(seconds)
    rows = [
        DecodeStats(count - len(ids), steps, drafted, accepted, took)
        for count, ids, (steps, drafted, accepted), took in zip(
            counts, prompt, engine.stats.tolist(), seconds, strict=True
        )
    ]
    sequences = [engine.tokens[row, :count].tolist() for row, count in enumerate(counts)]
    return DecodeResult(sequences, rows, DecodeStats.total(rows, elapsed))
