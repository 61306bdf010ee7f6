"""csrc/bindings/module.cpp. A tensor is an array with a buffer, as NumPy's, or anything with __dlpack__.

On the CPU; uint16 stands for the bits of bf16, which NumPy has no name for. What a batch is bound to must be
writable; weights, states and masks need not be.
"""

from typing import Any

ABI_VERSION: int

def instruction_set() -> str: ...
def default_threads() -> int: ...

class Engine:
    def __init__(
        self,
        weights: dict[str, Any],
        *,
        layers: int,
        heads: int,
        blocks: int,
        groups: int,
        last_layer_only: bool,
        threads: int,
        encoder_stride: int = 1,
        key_heads: int = 0,
        rms_norm: bool = False,
        norm_eps: float = 0.0,
        gated: bool = False,
        rotary_base: float = 0.0,
        cross: bool = True,
        device: str = "cpu",
        variant: str | None = None,
    ) -> None: ...
    def set_stream(self, stream: int) -> None: ...
    def bind(
        self,
        *,
        kv: Any,
        lengths: Any,
        tokens: Any,
        finished: Any,
        stats: Any,
        cross_kv: Any,
        cross_lengths: Any,
        kv_scale: Any = None,
        cross_kv_scale: Any = None,
    ) -> None: ...
    def encode(self, row: int, states: Any) -> None: ...
    def prefill(
        self, row: int, count: int, first: int = 0, position: int = 0, logits: Any = None
    ) -> None: ...
    def step(self, mask: Any, *, k: int, eos: int, max_length: int, draft: bool) -> None: ...
    def run(self, mask: Any, *, k: int, eos: int, max_length: int, draft: bool, steps: int) -> None: ...
    def profile(
        self, mask: Any, *, k: int, eos: int, max_length: int, draft: bool
    ) -> list[tuple[str, int, int]]: ...
    def progress(self, row: int) -> list[int]: ...

class Encoder:
    def __init__(
        self,
        weights: dict[str, Any],
        *,
        layers: int,
        heads: int,
        format: str,
        threads: int,
        output_positions: bool = False,
        variant: str | None = None,
    ) -> None: ...
    @property
    def instruction_set(self) -> str: ...
    def log_mel(self, samples: Any, features: Any) -> None: ...
    def encode(self, features: Any, states: Any) -> None: ...

class Segment:
    start: float
    end: float
    text: str
    tokens: list[int]
    avg_logprob: float
    no_speech_prob: float
    language: str
    language_probability: float
    cut: bool

class Model:
    def __init__(self, path: str, *, threads: int = 0, variant: str | None = None) -> None: ...
    @property
    def statistics(self) -> tuple[int, int, int, int]:
        """Of the last call: tokens, steps, drafted and accepted tokens."""
    def transcribe(
        self,
        samples: Any,
        *,
        language: str | None = None,
        target: str | None = None,
        without_timestamps: bool = False,
    ) -> list[Segment]: ...
