"""The miniature's recipe: the paper's training (arXiv 2508.11189, section 2), at small scale, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One run of the optimiser."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """All that the miniature depends on."""

    seed: int = 0
    clips_per_template: int = 160
    vocab_size: int = 4000
    window_seconds: int = 6
    d_model: int = 192
    heads: int = 3
    ffn_dim: int = 768
    encoder_layers: int = 5
    parent_decoder_layers: int = 8
    decoder_layers: int = 6
    text_encoder_layers: int = 6
    max_target_positions: int = 96
    dropout: float = 0.0
    ctc: float = 0.5
    lora_rank: int = 32
    distillation: float = 1.0
    parent: Stage = field(default_factory=lambda: Stage(4200, 32, 1.5e-3))
    base: Stage = field(default_factory=lambda: Stage(3200, 32, 1e-3))
    targets: int = 3
    decoder: Stage = field(default_factory=lambda: Stage(1000, 32, 1e-3))
    draft: Stage = field(default_factory=lambda: Stage(300, 32, 1e-3))

    @property
    def window(self) -> int:
        """Frames of the model's window, 100 a second."""
        return 100 * self.window_seconds
