"""The recipe of a draft network for a Whisper that exists: what it hears, what it is, how it learns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from kvspn.checks import boolean, integer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOSSES = ("distillation", "cross_entropy")


@dataclass(frozen=True)
class DraftRecipe:
    """All that a draft network depends on beside its base model and the clips.

    What is heard:
        seed: of all that is drawn.
        windows: for training, at most; None for all that the clips give.
        joined: share of the windows that are filled with clips of one language, one after the other; the
            others hold one clip.
        held_out, held_out_windows: share of the clips' seconds that training never hears, by speaker where
            the clips know theirs, else by file; and the windows of them that are judged, at most.
        translate: whether the base translates to English too, what is not English; timestamps: whether it
            tells times too. It transcribes without them in any case.
        weights: the format of its decoder that says all this (see `kvspn.weights.formats.quantise`); None is
            that of its file.

    What it is:
        blocks, groups: of the draft network, as in WhisperM2MConfig; None for three, or the most below that
            divide the decoder's layers.
        ffn_dim: width of a block's FFN; None is the base decoder's.
        encoder_attention: whether a block reads the encoder's output; encoder_stride: every n-th position,
            which lie first in the cache then: above 1 the base's own sums over them round in another order,
            and its text is the same but for rounding.
        draft_vocabulary: the tokens that it can guess, those that the base said most often; None,
            or as many as there are, for all.

    How it learns:
        loss: "distillation" of the base's distribution, or "cross_entropy" of the tokens that it chose.
        steps, batch: of the optimiser, and the windows of each on one device; targets: outputs of a window
            that a step learns from.
        learning_rate: its largest.
        evaluate_every: steps between two looks at what is held out; there is a checkpoint at each.
    """

    seed: int = 0
    windows: int | None = None
    joined: float = 0.5
    held_out: float = 0.03
    held_out_windows: int = 48
    translate: bool = True
    timestamps: bool = True
    weights: str | None = None
    blocks: int | None = None
    groups: int | None = None
    ffn_dim: int | None = None
    encoder_attention: bool = True
    encoder_stride: int = 1
    draft_vocabulary: int | None = 16_384
    loss: str = "distillation"
    steps: int = 6000
    batch: int = 8
    targets: int = 2
    learning_rate: float = 1e-3
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        for name, lowest in _WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                integer(name, value, lowest, 2**31 - 1)
        for name in ("translate", "timestamps", "encoder_attention"):
            boolean(name, getattr(self, name))
        for name, low, high in (("joined", 0, 1), ("held_out", 0.001, 0.5), ("learning_rate", 1e-9, 1)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.weights is not None and not isinstance(self.weights, str):
            raise TypeError(f"weights must be the name of a format, got {self.weights!r}")

    @classmethod
    def read(cls, file: Path) -> DraftRecipe:
        """The recipe of a TOML file; what it does not name is as above.

        Raises ValueError or TypeError that name the file, and the field.
        """
        try:
            said = tomllib.loads(file.read_text("utf-8"))
            known = [each.name for each in fields(cls)]
            for name in said:
                if name not in known:
                    raise ValueError(f"{name} is no field of a recipe, which are {', '.join(known)}")
            return cls(**said)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error


_WHOLE: Mapping[str, int] = {
    "seed": 0,
    "windows": 1,
    "held_out_windows": 1,
    "blocks": 1,
    "groups": 1,
    "ffn_dim": 1,
    "encoder_stride": 1,
    "draft_vocabulary": 2,
    "steps": 1,
    "batch": 1,
    "targets": 1,
    "evaluate_every": 1,
}
_OPTIONAL = {"windows", "blocks", "groups", "ffn_dim", "draft_vocabulary"}
