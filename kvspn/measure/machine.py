"""What this machine and installation are: for `kvspn doctor`, and beside figures measured here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kvspn

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "av", "soxr", "sacrebleu", "jiwer")
TRAINING_PACKAGES = ("peft", "accelerate", "Babel", "soundfile")
PEER_PACKAGES = ("ctranslate2", "faster-whisper", "pywhispercpp", "openvino", "onnxruntime", "onnx")


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not installed."""
    found = {"kvspn": kvspn.__version__, "python": platform.python_version()}
    return {**found, **{name: _installed(name) for name in (*_PACKAGES, *TRAINING_PACKAGES, *PEER_PACKAGES)}}


def cpu() -> dict[str, Any]:
    """model, cores (that this process may use), threads (of torch), flags: which of CPU_FLAGS it has,
    instruction_set: of the native kernels.
    """
    file = Path("/proc/cpuinfo")
    info = file.read_text() if file.exists() else ""
    model = re.search(r"^model name\s*: (.*)", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", info, re.MULTILINE)
    found = flags[1].split() if flags else []
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": {flag: flag in found for flag in CPU_FLAGS},
        "instruction_set": _instruction_set(),
    }


class Elsewhere:
    """What other programs do with the cores that this process may use, since this object was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """How many of them they kept busy on average; None where the system does not say."""
        now = self._now()
        if now is None or self._start is None:
            return None
        seconds, busy, own = (after - before for before, after in zip(self._start, now, strict=True))
        return round(max(busy - own, 0) / max(seconds, 1e-9), 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds that have passed, in which the cores were busy, and those of this process."""
        file = Path("/proc/stat")
        if not file.exists() or not hasattr(os, "sched_getaffinity"):
            return None
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        busy = 0
        for name, *ticks in map(str.split, file.read_text().splitlines()):
            if name in cores:
                user, nice, system, _, _, irq, softirq, steal, *_ = map(int, ticks)
                busy += user + nice + system + irq + softirq + steal
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def gpu() -> dict[str, Any]:
    """devices: name, compute capability and GiB of each; cuda: the version torch was built for; nvcc."""
    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(
            {
                "name": properties.name,
                "capability": capability,
                "gib": round(properties.total_memory / 2**30, 1),
            }
        )
    nvcc = program("nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    return {"devices": devices, "cuda": torch.version.cuda, "nvcc": nvcc}


def program(name: str, folder: str | None = None) -> str | None:
    """The version of a program on the path, or else in `folder`; None where it is not installed."""
    path = shutil.which(name) or (shutil.which(name, path=folder) if folder else None)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"\d+(\.\d+)+", said)
    return version[0] if version else "unknown"


def _instruction_set() -> str | None:
    """None where the native backend is not built, or KVSPN_CPU names what the machine lacks."""
    try:
        from kvspn import _native
    except ImportError:
        return None
    return _native.instruction_set() or None


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
