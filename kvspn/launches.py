"""Launches of a call on a GPU, and how often the host waits for it, as torch.profiler sees the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_RANGE = "kvspn: counted"


def count(call: Callable[[], object], device: str) -> tuple[int, int | None]:
    """Launches and host synchronisations of a call; on a CPU it is one, and nothing is waited for.

    A launch is a kernel, a graph or a copy that the host enqueues.
    """
    if device != "cuda":
        return 1, None
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled, record_function(_RANGE):
        call()
    return tally(profiled.events())


def tally(events: Iterable[Any]) -> tuple[int, int]:
    """Of a profile's events, those inside the counted range: (launches, synchronisations)."""
    events = list(events)
    span = next(event.time_range for event in events if event.name == _RANGE)
    # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch, cudaMemcpyAsync, cudaMemsetAsync, ...
    names = [
        event.name
        for event in events
        if event.name.startswith("cu") and span.start <= event.time_range.start <= span.end
    ]
    launches = sum(any(word in name for word in ("Launch", "Memcpy", "Memset")) for name in names)
    return launches, sum("Synchronize" in name for name in names)
