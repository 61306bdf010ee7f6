"""What a decoder is made of, apart from its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvspn.checks import boolean, integer, number


@dataclass(frozen=True)
class Architecture:
    """Whisper's by default; ``QWEN2`` is that of Qwen2's decoder, which Llama's and others share.

    Attributes:
        key_heads: heads KVH of keys and values, each for H / KVH heads of queries (arXiv 2305.13245); 0: as
            many as there are of queries.
        rms_norm: RMSNorm (arXiv 1910.07467), whose norms have no bias, in place of LayerNorm.
        norm_eps: what a norm adds to the variance.
        gated: SwiGLU (arXiv 2002.05202), fc2(silu(gate) * other), in place of GELU: fc1 is [2F, d], the
            gate's rows first.
        rotary_base: of RoPE (arXiv 2104.09864): queries and keys are turned by the angles of their positions
            instead of embeddings that are added; 0: embeddings.
        cross: whether layers attend to an encoder.

    Raises:
        TypeError, ValueError: naming the field.
    """

    key_heads: int = 0
    rms_norm: bool = False
    norm_eps: float = 1e-5
    gated: bool = False
    rotary_base: float = 0.0
    cross: bool = True

    def __post_init__(self) -> None:
        integer("key_heads", self.key_heads, 0, 2**31 - 1)
        for name in ("rms_norm", "gated", "cross"):
            boolean(name, getattr(self, name))
        number("norm_eps", self.norm_eps)
        if self.rotary_base != 0 and not 1 < self.rotary_base < math.inf:
            raise ValueError(f"rotary_base must be 0, or a number above 1, got {self.rotary_base}")
        if self.cross and self.key_heads:
            raise ValueError(f"key_heads must be 0 with cross-attention, got {self.key_heads}")


WHISPER = Architecture()
QWEN2 = Architecture(rms_norm=True, norm_eps=1e-6, gated=True, rotary_base=1e6, cross=False)
