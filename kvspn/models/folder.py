"""A model's folder on disk: what it must hold, and opening it, with one clear line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PARTS = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "preprocessor": ("preprocessor_config.json", "processor_config.json"),
    "generation configuration": ("generation_config.json",),
}
"""The parts of a model's folder, and the files of which one must be there for each."""


class ModelError(ValueError):
    """A model folder that cannot be used: one line that names it and says what is missing or wrong."""


def check_parts(folder: Path) -> None:
    """Raises ModelError where the folder or one of its PARTS is not there."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    for part, files in PARTS.items():
        if not any((folder / file).is_file() for file in files):
            raise ModelError(f"{folder}: the {part} is missing ({files[0]})")


def open_folder(
    folder: Path, model_class: type[Any], processor_class: type[Any], dtype: torch.dtype | str = "auto"
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the processor of a local folder; nothing is downloaded.

    Raises:
        ModelError: no such folder, a missing part, another kind of model, or files that cannot be read.
    """
    check_parts(folder)
    try:
        found = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
        if found == (wanted := model_class.config_class.model_type):
            model, report = model_class.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            processor = processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files fail in many ways, in several libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{folder}: cannot be read: {reason}") from error
    if found != wanted:
        raise ModelError(f"{folder}: model type {found!r}, must be {wanted!r}")
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    return model.eval(), processor
