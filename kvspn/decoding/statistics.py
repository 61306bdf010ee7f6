"""What decoding took."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeStats:
    """One row's figures, or a whole batch's.

    tokens: generated tokens, eos included and prompt excluded.
    steps: decoder steps. drafted, accepted: tokens guessed by the draft network, and those of them emitted.
    seconds: wall time of the steps, until the row finished; what comes before the first step is not in it.
    """

    tokens: int
    steps: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def acceptance(self) -> float:
        """accepted / drafted; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """tokens / steps; 0 without a step."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def alpt_ms(self) -> float:
        """Average latency per token in milliseconds (arXiv 2508.11189); 0 without a token."""
        return 1000 * self.seconds / self.tokens if self.tokens else 0.0

    @classmethod
    def total(cls, rows: Iterable[DecodeStats], seconds: float) -> DecodeStats:
        """The sum of the rows' counts, with the wall time of them all."""
        counts = [(row.tokens, row.steps, row.drafted, row.accepted) for row in rows]
        tokens, steps, drafted, accepted = (sum(column) for column in zip((0, 0, 0, 0), *counts, strict=True))
        return cls(tokens, steps, drafted, accepted, seconds)


def compression_ratio(text: str) -> float:
    """Bytes of UTF-8 over what zlib makes of them: what repeats itself is far above 2."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
