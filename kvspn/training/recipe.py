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
    vocab_size: int = 1500
    window_seconds: int = 6
    d_model: int = 192
    heads: int = 3
    ffn_dim: int = 768
    init_std: float = 0.06  # about 1 / sqrt(d_model); Whisper's 0.02 is for wider models
    encoder_layers: int = 7
    phoneme_layers: int = 5  # the encoder's first, which learn the sounds; those above put words together
    parent_decoder_layers: int = 6
    decoder_layers: int = 4
    text_encoder_layers: int = 6
    kvspn_blocks: int = 2
    max_target_positions: int = 128
    dropout: float = 0.0
    lora_rank: int = 32
    distillation: float = 1.0
    targets: int = 2  # of each clip
    draft_clips: int = 16_000  # of the corpus, on which the draft network learns
    draft_targets: int = 6
    encoder: Stage = field(default_factory=lambda: Stage(2800, 32, 3e-3))
    parent: Stage = field(default_factory=lambda: Stage(300, 32, 2e-3))
    base: Stage = field(default_factory=lambda: Stage(2400, 32, 2e-3))
    adapt: Stage = field(default_factory=lambda: Stage(120, 16, 5e-5))
    draft: Stage = field(default_factory=lambda: Stage(2500, 16, 2e-3))

    @property
    def window(self) -> int:
        """Frames of the model's window, 100 a second."""
        return 100 * self.window_seconds
