"""Where drafts come from beside the draft network: the caller's guesses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvspn.checks import integer
from kvspn.ops import K_INF
from kvspn.ops.decoder_step import MOST_DRAFTS


class GivenDrafts:
    """What the caller guesses to follow each row's tokens.

    A row is followed through its guess. Where the two part, the guess counts again from the nearest place in
    it that holds the row's newest token. Where there is none, what a row says again is guessed from the row
    itself: what followed when it had its two newest tokens before.

    Args:
        guesses: per row token ids; None for no guess at all. A row without any gets none from itself, either.
        rows: how many there are.
        repeats: whether rows are guessed from themselves. With k above 1 that would make them repeat
            themselves.

    Raises:
        TypeError, ValueError: naming draft_tokens.
    """

    def __init__(self, guesses: Sequence[Sequence[int]] | None, rows: int, repeats: bool = True) -> None:
        self._guesses = [[] for _ in range(rows)] if guesses is None else [list(guess) for guess in guesses]
        if len(self._guesses) != rows:
            raise ValueError(f"draft_tokens must hold {rows} rows, got {len(self._guesses)}")
        for row, guess in enumerate(self._guesses):
            for token in guess:
                integer(f"every token of draft_tokens[{row}]", token, 0, K_INF)
        self._repeats = repeats
        self._said: list[list[int]] = [[] for _ in range(rows)]
        self._places = [0] * rows  # in the guess, behind the newest token
        self._parted = [False] * rows  # whether that token is not the guess's

    def next(self, finished: Sequence[bool], like: Tensor) -> Tensor | None:
        """The drafts of a step, int32 [batch, 1 to 15] on ``like``'s device; None where no row has one."""
        drafts = [[] if done else self._next(row)[:MOST_DRAFTS] for row, done in enumerate(finished)]
        width = max(map(len, drafts))
        if not width:
            return None
        return like.new_tensor([draft + [-1] * (width - len(draft)) for draft in drafts])

    def _next(self, row: int) -> list[int]:
        guess = self._guesses[row]
        if guess[self._places[row] :] and not self._parted[row]:
            return guess[self._places[row] :]
        said = self._said[row]
        if guess and self._repeats:
            for last in range(len(said) - 2, 0, -1):
                if said[last - 1 : last + 1] == said[-2:]:
                    return said[last + 1 :]
        return []

    def advance(self, row: int, tokens: list[int]) -> None:
        """A row has got these tokens."""
        guess, place = self._guesses[row], self._places[row]
        if not guess or not tokens:
            return
        self._said[row] += tokens
        end = min(place + len(tokens), len(guess))
        same = not self._parted[row] and guess[place:end] == tokens
        alike = [end] if same else [i + 1 for i, token in enumerate(guess) if token == tokens[-1]]
        self._parted[row] = not alike
        self._places[row] = min(alike or [end], key=lambda each: (abs(each - end), -each))
