"""A model's folder on disk: what it must hold, and opening it, with one clear line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kvspn.assets import PARTS, missing_part
from kvspn.models.validation import (
    ModelError,
    check_config,
    check_features,
    check_generation,
    check_processor,
    check_weights,
    reason,
)

__all__ = ["ModelError", "open_folder"]


def open_folder(
    folder: Path, model_class: type[Any], processor_class: type[Any], dtype: torch.dtype | str = "auto"
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the processor of a local folder; nothing is downloaded.

    All that its files say is held against each other before anything is built, the weights' values after.

    Raises:
        ModelError: no such folder, a missing part, another kind of model, files that cannot be read, or that
            do not fit each other.
    """
    if (missing := missing_part(folder)) is not None:
        raise ModelError(missing)
    try:
        return _open(folder, model_class, processor_class, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    except Exception as error:  # damaged files fail in many ways, in several libraries
        raise ModelError(f"{folder}: cannot be read: {reason(error)}") from error


def _open(folder: Path, model_class: type[Any], processor_class: type[Any], dtype: Any) -> tuple[Any, Any]:
    settings = _read(folder / "config.json")
    if (found := settings.get("model_type")) != (wanted := model_class.config_class.model_type):
        raise ModelError(f"model type {found!r}, must be {wanted!r}")
    config = model_class.config_class.from_dict(settings)
    check_config(config, _shapes(folder))
    check_generation(_read(folder / "generation_config.json"), config)
    single, joint = (folder / file for file in PARTS["preprocessor"])
    check_features(_read(single) if single.is_file() else _read(joint)["feature_extractor"], config)
    model, report = model_class.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    check_weights(model)
    processor = processor_class.from_pretrained(folder, local_files_only=True)
    check_processor(processor, config)
    return model.eval(), processor


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name}: must be a JSON object, got {type(content).__name__}")
    return content


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, from the headers of the safetensors files."""
    single, index = (folder / file for file in PARTS["weights"])
    files = {single.name} if single.is_file() else set(_read(index)["weight_map"].values())
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(files):
        with safe_open(folder / file, "np") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes
