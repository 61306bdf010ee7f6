"""The C++ engine (csrc) on a CUDA device: the whole decoder step in one launch."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from kvspn import _cuda
from kvspn._cuda import instruction_set
from kvspn.native import NativeEngine


class CudaEngine(NativeEngine):
    """One call of the CUDA engine a step, on the default stream, without waiting for the device.

    Numerics are those of :class:`NativeEngine`: fp32 activations and logits, weights and cache in their own
    formats. The environment variable KVSPN_CUDA_STEP says how a step runs: "persistent" (one cooperative
    kernel), "graph" (the kernels of its stages as one CUDA graph) or "kernels" (one by one); all three give
    the same bits. A prompt's length and every address stay out of graphs, so that one serves all steps.
    """

    module: ClassVar[ModuleType] = _cuda
    # The tests' build of csrc/cuda runs on the host.
    device: ClassVar[str] = "cpu" if instruction_set() == "cuda, emulated" else "cuda"
