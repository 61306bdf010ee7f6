"""The miniature's recipe: the paper's training (arXiv 2508.11189, section 2), at small scale, from nothing.

    data       sentences, tokenizer, spoken clips, features
    parent     a small Whisper learns to transcribe six languages
    base       its decoder is pruned, a text encoder added, its encoder adapted by LoRA:
               speech translation + text translation + distillation from text to speech translation
    draft      KVSPN alone, the base model frozen
    export     fp16 weights, test sets, model card

Each stage leaves its result in a folder of its own and is skipped when it is there; an interrupted stage goes
on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvspn.training.export import export_model, export_speech
from kvspn.training.prepare import make_data
from kvspn.training.stages import train_base, train_draft, train_parent

Log = Callable[[str], None]


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
    base: Stage = field(default_factory=lambda: Stage(2800, 32, 1e-3))
    draft: Stage = field(default_factory=lambda: Stage(500, 32, 1e-3))

    @property
    def window(self) -> int:
        """Frames of the model's window, 100 a second."""
        return 100 * self.window_seconds


def train_mini(folder: Path, recipe: Recipe | None = None, log: Log = print) -> Path:
    """Runs all stages in `folder` and returns the folder of the finished model, `folder/mini`.

    The spoken test sets are written to `folder/speech`.
    """
    recipe = recipe or Recipe()
    corpus = make_data(folder, recipe, log)
    for stage in (train_parent, train_base, train_draft):
        log(stage.__name__.replace("_", " "))
        trained = stage(folder, recipe, corpus)
    export_model(trained, corpus, folder / "mini")
    export_speech(corpus, folder / "speech", recipe.seed)
    return folder / "mini"


ABLATIONS = {
    "draft-without-encoder-attention": {"kvspn_encoder_attention": False},
    "draft-last-layer-only": {"kvspn_last_layer_only": True},
}
"""Draft networks on the same base and budget, for the record: folder -> fields of the config."""


def train_ablations(folder: Path, recipe: Recipe | None = None, log: Log = print) -> list[Path]:
    """After `train_mini`, in the same folder."""
    recipe = recipe or Recipe()
    corpus = make_data(folder, recipe, log)
    return [train_draft(folder, recipe, corpus, name, **fields) for name, fields in ABLATIONS.items()]
