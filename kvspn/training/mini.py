"""Training the miniature: all stages of the recipe, one after the other.

    data       sentences, tokenizer, spoken clips, features
    encoder    the speech encoder learns the phonemes and the word pieces of six languages (CTC)
    parent     a decoder on it learns to transcribe: a small Whisper
    base       its decoder is pruned, a text encoder added:
               speech translation + text translation + distillation from text to speech translation,
               the speech encoder's upper layers learning too
    adapted    the same with the whole speech encoder, by LoRA, the decoder's matrices rounded to int8
    draft      KVSPN alone, the base model frozen, on what the base model itself says of the clips
    export     fp16 weights, spoken test sets

Each stage leaves its result in a folder of its own and is skipped when it is there; an interrupted stage goes
on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvspn.training.export import export_model, export_speech
from kvspn.training.prepare import make_data
from kvspn.training.recipe import Recipe
from kvspn.training.stages import adapt_encoder, train_base, train_draft, train_encoder, train_parent

Log = Callable[[str], None]


def train_mini(folder: Path, recipe: Recipe | None = None, log: Log = print) -> Path:
    """Runs all stages in `folder` and returns the folder of the finished model, `folder/mini`.

    The spoken test sets are written to `folder/speech`.
    """
    recipe = recipe or Recipe()
    corpus = make_data(folder, recipe, log)
    for stage in (train_encoder, train_parent, train_base, adapt_encoder, train_draft):
        log(stage.__name__.replace("_", " "))
        trained = stage(folder, recipe, corpus)
    export_model(trained, corpus, folder / "mini")
    export_speech(corpus, folder / "speech", recipe.seed)
    return folder / "mini"


ABLATIONS: dict[str, dict[str, bool | int]] = {
    "draft-without-encoder-attention": {"kvspn_encoder_attention": False},
    "draft-last-layer-only": {"kvspn_last_layer_only": True},
    "draft-encoder-stride-4": {"kvspn_encoder_stride": 4},
}
"""Draft networks on the same base and budget, for the record: folder -> fields of the config."""


def train_ablations(folder: Path, recipe: Recipe | None = None, log: Log = print) -> list[Path]:
    """After `train_mini`, in the same folder."""
    recipe = recipe or Recipe()
    corpus = make_data(folder, recipe, log)
    return [train_draft(folder, recipe, corpus, name, **fields) for name, fields in ABLATIONS.items()]
