"""What a call costs a CUDA device: its time by CUDA events, and what is launched, by torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType

_ROUNDS = 20
_FLUSH = 1 << 28  # bytes written before each timing, more than an L2 cache holds
_CLOCK = 2e9  # cycles a second, about
_LAUNCH = re.compile(r"cu(da)?(Graph)?Launch|cu(da)?Mem(cpy|set)")


def on_device(call: Callable[[], object], reset: Callable[[], object], seconds: float) -> dict[str, Any]:
    """``device_ms`` of a call, median, and its ``launches`` and ``kernels``; ``seconds``: what it takes."""
    return {"device_ms": median(device_ms(call, reset, seconds)), **launches(call, reset)}


def device_ms(call: Callable[[], object], reset: Callable[[], object], seconds: float) -> list[float]:
    """The L2 cache is cold, and the device busy until the host has enqueued the whole call."""
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_ROUNDS):
        reset()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_CLOCK * min(2 * seconds, 0.05)))
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def launches(call: Callable[[], object], reset: Callable[[], object]) -> dict[str, int | None]:
    """What the host launches (kernels, graphs, copies) and what the device then runs, in one call."""
    reset()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    except RuntimeError:  # no leave to trace this device: the times still count
        return count([])
    return count([(event.name, event.device_type == DeviceType.CUDA) for event in profile.events()])


def count(events: Sequence[tuple[str, bool]]) -> dict[str, int | None]:
    """Of pairs (name, whether it ran on the device); None where the profiler saw nothing."""
    kernels = sum(there for _, there in events)
    launched = sum(not there and _LAUNCH.match(name) is not None for name, there in events)
    return {"launches": launched or None, "kernels": kernels or None}
