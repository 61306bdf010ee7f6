"""When tokens are said, by what they listen to: dynamic time warping of cross-attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

POSITION = 0.02  # seconds of sound in an encoder position
_FILTER = 7  # positions over which a median is taken, as in OpenAI's Whisper


def starts(weights: Tensor) -> list[float]:
    """The seconds at which tokens begin, never falling; the last one's end where the next begins.

    As OpenAI's Whisper finds them: each head's attention over the window's sound, less what all tokens share,
    smoothed; and through their mean the likeliest path that only goes forward.

    Args:
        weights: fp32 [heads, N, E], the attention of N tokens over the E positions that are sound: of a
            softmax of :meth:`kvspn.engines.Engine.cross_scores`.
    """
    spread, mean = torch.std_mean(weights, dim=1, keepdim=True, correction=0)
    weights = (weights - mean) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    half = _FILTER // 2
    if weights.shape[-1] > half:
        padded = F.pad(weights, (half, half), mode="reflect")
        weights = padded.unfold(-1, _FILTER, 1).median(-1).values
    token, position = path(-weights.mean(0).double().cpu().numpy())
    first = np.diff(token, prepend=-1) > 0
    return [float(each) * POSITION for each in position[first]]


def path(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way through costs [N, M], from its first corner to the last: rows and columns, ascending.

    Dynamic time warping (Sakoe and Chiba, 1978): a step goes to the next row, the next column or both. Equal
    ways prefer the next column, as OpenAI's do.
    """
    rows, columns = costs.shape
    # Skewed, so that what lies on one diagonal is computed at once: `total[d, i]` is of row i, column d - i.
    total = np.full((rows + columns + 1, rows + 1), np.inf)
    came = np.full((rows + columns + 1, rows + 1), 2, np.int8)  # 0: from both, 1: from the row, 2: the column
    total[0, 0] = 0
    came[np.arange(1, rows + 1), np.arange(1, rows + 1)] = 1
    for d in range(2, rows + columns + 1):
        i = np.arange(max(1, d - columns), min(rows, d - 1) + 1)
        both, above, left = total[d - 2, i - 1], total[d - 1, i - 1], total[d - 1, i]
        best = np.where((both < above) & (both < left), 0, np.where((above < both) & (above < left), 1, 2))
        total[d, i] = costs[i - 1, d - i - 1] + np.choose(best, (both, above, left))
        came[d, i] = best
    i, j = rows, columns
    way = []
    while i or j:
        way.append((i - 1, j - 1))
        step = came[i + j, i]
        i, j = i - (step != 2), j - (step != 1)
    row, column = np.array(way[::-1]).T
    return row, column
