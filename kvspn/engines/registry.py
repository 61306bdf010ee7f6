"""Which engines there are, which of them run here, and why the others do not."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

import torch

from kvspn.engines.base import Engine
from kvspn.weights import DecoderWeights

_ENGINES = {  # imported when one is made
    "reference": "kvspn.engines.reference.ReferenceEngine",
    "native": "kvspn.engines.native.NativeEngine",
    "cuda": "kvspn.engines.cuda.CudaEngine",
    "triton": "kvspn.triton_kernels.engine.TritonEngine",
}


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it is ready, else why it is missing."""
    return {
        "reference": None,
        "native": _extension_missing("kvspn._native"),
        "cuda": _cuda_missing(),
        "triton": _triton_missing(),
    }


def _extension_missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"its extension is not built here ({error})"
    return None


def _cuda_missing() -> str | None:
    missing = _extension_missing("kvspn._native")
    if missing is not None:
        return missing
    # The tests' build of csrc/cuda is on the host.
    memory = importlib.import_module("kvspn.engines.cuda").CudaEngine.module.DEVICES.get("cuda")
    if memory is None:
        return "its extension is not built here (KVSPN_CUDA=1 builds it, with nvcc)"
    return None if memory == "cpu" or torch.cuda.is_available() else "PyTorch sees no CUDA device here"


def _triton_missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if find_spec("kvspn.triton_kernels") is None:
        return "kvspn.triton_kernels is not installed: install the package (pip install -e .)"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU; TRITON_INTERPRET=1 runs it in the interpreter"
    return None


def default_backend(device: torch.device) -> str:
    """The fastest ready backend for weights on a device."""
    found = backends()
    order = ("cuda", "triton") if device.type == "cuda" else ("native",)
    return next((name for name in order if found[name] is None), "reference")


def engine(
    name: str,
    weights: DecoderWeights,
    *,
    batch: int,
    capacity: int,
    cross_capacity: int,
    kv: str | None = None,
) -> Engine:
    """Make an engine on a backend.

    Args:
        name: one of :func:`backends`.
        weights: the decoder and its draft network; they settle dtype and device.
        batch: rows decoded together.
        capacity: tokens that a row may hold, prompt included; at most the number of positions.
        cross_capacity: encoder states that a row may hold.
        kv: "int8" for caches of int8 with a scale for each position and head; None: of the embeddings' dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    found = backends()
    ready = [other for other, missing in found.items() if missing is None]
    if name not in ready:
        reasons = "".join(f"; {other}: {missing}" for other, missing in found.items() if missing)
        raise ValueError(f"name must be one of {', '.join(ready)}, got {name!r}{reasons}")
    module, _, kind = _ENGINES[name].rpartition(".")
    made: type[Engine] = getattr(importlib.import_module(module), kind)
    return made(weights, batch=batch, capacity=capacity, cross_capacity=cross_capacity, kv=kv)
