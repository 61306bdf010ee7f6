"""What a call costs a CUDA device: its time by CUDA events, and what is launched."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from kvspn.measure.launches import count

_ROUNDS = 20
_FLUSH = 1 << 28  # bytes read before each timing, more than an L2 cache holds
_CLOCK = 2e9  # cycles a second, about


def on_device(call: Callable[[], object], reset: Callable[[], object], seconds: float) -> dict[str, Any]:
    """``device_ms`` of a call, median, and what kvspn.measure.launches counts; ``seconds``: what it takes."""
    return {"device_ms": median(device_ms(call, reset, seconds)), **count(call, reset)}


def device_ms(call: Callable[[], object], reset: Callable[[], object], seconds: float) -> list[float]:
    """The L2 cache is cold, and the device busy until the host has enqueued the whole call."""
    flush = torch.ones(_FLUSH // 4, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_ROUNDS):
        reset()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_CLOCK * min(2 * seconds, 0.05)))
        flush.sum()  # what was written would have to go back to memory while the call is timed
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times
