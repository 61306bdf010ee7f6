"""What a call launches on a CUDA device, and how often the host waits for it, as torch.profiler sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_CALL = "kvspn: the call that is counted"
_LAUNCH = re.compile(r"cu(da)?(Graph)?Launch|cu(da)?Mem(cpy|set)")
_WAIT = re.compile(r"cu(da)?\w*Synchronize")


def count(call: Callable[[], object], reset: Callable[[], object] = lambda: None) -> dict[str, int | None]:
    """Of one call, None where the profiler sees nothing.

    launches: of kernels, graphs and copies by the host. kernels: what the device then runs.
    host_synchronisations: how often the host waits for the device.
    """
    reset()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            with record_function(_CALL):
                call()
            torch.cuda.synchronize()
    except RuntimeError:  # no leave to trace this device
        return tally([])
    events = profiled.events()
    spans = [event.time_range for event in events if event.name == _CALL]
    return tally(
        [
            (event.name, event.device_type.name == "CUDA")
            for event in events
            if event.name != _CALL
            and (
                event.device_type.name == "CUDA"
                or any(span.start <= event.time_range.start <= span.end for span in spans)
            )
        ]
    )


def tally(events: Sequence[tuple[str, bool]]) -> dict[str, int | None]:
    """Of pairs (name, whether it ran on the device); None where the profiler saw nothing."""
    kernels = sum(there for _, there in events)
    host = [name for name, there in events if not there]
    launched = sum(_LAUNCH.match(name) is not None for name in host)
    waited = sum(_WAIT.match(name) is not None for name in host)
    return {
        "launches": launched or None,
        "kernels": kernels or None,
        "host_synchronisations": waited if launched or kernels else None,
    }
