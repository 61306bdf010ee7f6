"""The C++ engine (csrc) on a CUDA device: the whole decoder step in one launch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from kvspn.engines.native import NativeEngine


class CudaEngine(NativeEngine):
    """One call of the CUDA engine a step, on torch's current stream, without waiting for the device.

    Numerics are those of :class:`NativeEngine`: fp32 activations and logits, weights and cache in their own
    formats. The environment variable KVSPN_CUDA_STEP says how a step runs: "persistent" (one cooperative
    kernel), "graph" (the kernels of its stages as one CUDA graph) or "kernels" (one by one); all three give
    the same bits. A prompt's length and every address stay out of graphs, so that one serves all steps.

    Engines on different streams are independent; whoever moves an engine to another stream makes that one
    wait for the last, as for any tensor.
    """

    device: ClassVar[str] = "cuda"

    @property
    def _engine(self) -> Any:
        self._made.set_stream(current_stream(self.lengths.device))
        return self._made


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream on the device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
