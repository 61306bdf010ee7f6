"""Where drafts come from beside the draft network: the caller's guesses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvspn.checks import integer
from kvspn.ops import K_INF
from kvspn.ops.decoder_step import MOST_DRAFTS


class GivenDrafts:
    """What the caller guesses to follow each row's tokens, for as long as the row says the same.

    Args:
        guesses: per row token ids; None for no guess at all.
        rows: how many there are.

    Raises:
        TypeError, ValueError: naming draft_tokens.
    """

    def __init__(self, guesses: Sequence[Sequence[int]] | None, rows: int) -> None:
        self._left = [[] for _ in range(rows)] if guesses is None else [list(guess) for guess in guesses]
        if len(self._left) != rows:
            raise ValueError(f"draft_tokens must hold {rows} rows, got {len(self._left)}")
        for row, guess in enumerate(self._left):
            for token in guess:
                integer(f"every token of draft_tokens[{row}]", token, 0, K_INF)

    def next(self, finished: Sequence[bool], like: Tensor) -> Tensor | None:
        """The drafts of a step, int32 [batch, 1 to 15] on ``like``'s device; None where no row has one."""
        drafts = [
            [] if done else guess[:MOST_DRAFTS] for guess, done in zip(self._left, finished, strict=True)
        ]
        width = max(map(len, drafts))
        if not width:
            return None
        return like.new_tensor([draft + [-1] * (width - len(draft)) for draft in drafts])

    def advance(self, row: int, tokens: list[int]) -> None:
        """A row has got these tokens."""
        agreed, self._left[row] = self._left[row][: len(tokens)] == tokens, self._left[row][len(tokens) :]
        if not agreed:
            self._left[row] = []
