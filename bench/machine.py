"""What a record was measured on: ``python -m bench.machine`` prints it as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from statistics import median
from typing import Any

import torch

import kvspn
from kvspn.measure.machine import cpu


def machine(device: str) -> dict[str, Any]:
    """Device, driver, versions, date, and the bandwidth of a copy as measured now: the peak to judge by."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu()["model"],
        "driver": driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": round(copy_gb_per_s(device), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvspn": kvspn.__version__,
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copy_gb_per_s(device: str) -> float:
    """Bytes read and written by a copy far larger than any cache, median of ten; a GPU's by its own clock."""
    size = 1 << 31 if device == "cuda" else 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _device_seconds if device == "cuda" else _host_seconds
    return 2 * size / median(clock(lambda: target.copy_(source)) for _ in range(10)) / 1e9


def _host_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _device_seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


if __name__ == "__main__":
    print(json.dumps(machine("cuda" if torch.cuda.is_available() else "cpu"), indent=2))
