"""When the tokens of an output are said, and its segments, in the form that transformers gives them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvspn.decoding import alignment
from kvspn.decoding.alignment import POSITION
from kvspn.engines import Engine


def token_times(
    engine: Engine,
    row: int,
    tokens: Sequence[int],
    first: int,
    heads: Sequence[tuple[int, int]],
    sound: int,
) -> Tensor:
    """The seconds fp32 [N] at which the generated tokens of a row begin, from the passes that decoded them.

    As `generate(return_token_timestamps=True)` of transformers: a token's attention is that of the pass that
    processes it, over all the window, of which what is no sound is cut off; the last token has none, and the
    time of the one before it.

    Args:
        tokens: of the row, of which N stand from `first` on.
        sound: the encoder's positions that are.
    """
    new = len(tokens) - first
    if new < 2:
        return torch.zeros(new)
    scores = engine.cross_scores(row, heads, range(first, len(tokens) - 1))
    found = alignment.starts(scores.softmax(-1)[..., :sound])
    return torch.tensor([*found, found[-1]])


def pairs(tokens: Sequence[int], begin: int) -> list[int]:
    """Where the second timestamps of pairs stand, each the start of a segment. begin: the token of 0.00 s."""
    return [i for i, (one, other) in enumerate(pairwise(tokens), 1) if one >= begin and other >= begin]


def segments(
    tokens: Sequence[int],
    first: int,
    ends: Sequence[int],
    begin: int,
    seconds: float,
    times: Tensor | None,
) -> list[dict[str, Any]]:
    """The segments of a row's output: start and end in seconds, tokens, token_timestamps; result: the row.

    They are parted by pairs of timestamps. transformers leaves out what follows the last pair, and hears it
    again; here it is a segment too, up to the window's end.

    Args:
        tokens: of the row; those from `first` on are its output, which one of `ends` may end.
        begin: the token of 0.00 s.
        seconds: of the window.
        times: of the output's tokens, where they are asked for.
    """
    new = list(tokens[first:])
    new = new[:-1] if new and new[-1] in ends else new
    found = []
    for start, end in pairwise([0, *pairs(new, begin), len(new)]):
        piece = new[start:end]
        opened, closed = (bool(piece) and piece[i] >= begin for i in (0, -1))
        segment = {
            "start": torch.tensor((piece[0] - begin) * POSITION if opened else 0.0),
            "end": torch.tensor((piece[-1] - begin) * POSITION if closed and len(piece) > 1 else seconds),
            "tokens": torch.tensor(piece, dtype=torch.int64),
            "idxs": (first + start, first + end),
            "result": torch.tensor(list(tokens)),
        }
        if times is not None:
            segment["token_timestamps"] = times[start:end]
        found.append(segment)
    return found
