"""The speech encoder as one call of the C++ library, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from kvspn import _native
from kvspn.checks import integer

FORMATS = ("fp32", "bf16", "int8")


class NativeEncoder:
    """Log-mel features to states: Whisper's encoder as a plan of csrc, its matrices in one format.

    States do not depend on the number of threads, bit for bit. Threads may share it: each waits for its turn.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        layers: int,
        heads: int,
        format: str,
        threads: int = 0,
        output_positions: bool = False,
        variant: str | None = None,
    ) -> None:
        """
        Args:
            weights: by the names of `kvspn.models.weights.encoder_weights`, fp32, bf16 or fp16; they are
                packed, not kept.
            layers, heads: of the encoder.
            format: "fp32"; "bf16", sums in fp32; or "int8": the feed-forward networks in int8, each output
                and each row of activations with its own scale, all else as "bf16".
            threads: the caller's among them; 0: torch's present number, or
                :func:`kvspn.engines.native.default_threads` where these are fewer.
            output_positions: whether the positions' embeddings are added to the states, too.
            variant: an instruction set: "amx", "avx512bf16", "avx512vnni", "avx512", "avx2" or "portable";
                None: the fastest that is here. The environment's KVSPN_CPU overrides it.

        Raises:
            ValueError, TypeError: naming the argument, or the weight, that is wrong.
        """
        if format not in FORMATS:
            raise ValueError(f"encoder_format must be one of {', '.join(FORMATS)}, got {format!r}")
        integer("threads", threads, 0, 1024)
        self.format = format
        self.width = len(weights["encoder.conv1.weight"]) if "encoder.conv1.weight" in weights else 0
        self._lock = threading.Lock()
        self._encoder = _native.Encoder(
            {name: tensor.detach().cpu() for name, tensor in weights.items()},
            layers=layers,
            heads=heads,
            format=format,
            threads=threads or min(torch.get_num_threads(), _native.default_threads()),
            output_positions=output_positions,
            variant=variant,
        )

    @property
    def instruction_set(self) -> str:
        """What it works with."""
        return self._encoder.instruction_set

    def __call__(self, features: Tensor) -> Tensor:
        """features [mel bins, T], finite, of at most twice as many frames as the model has positions ->
        states fp32 [(T + 1) // 2, d]. Raises ValueError or TypeError that name the argument."""
        if features.dim() != 2:
            raise ValueError(f"features must be [mel bins, frames], got {tuple(features.shape)}")
        states = torch.empty((features.shape[1] + 1) // 2, self.width)
        with self._lock:
            self._encoder.encode(features.detach().float().cpu(), states)
        return states
