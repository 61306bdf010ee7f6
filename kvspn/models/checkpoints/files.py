"""Reading files that may be anything: errors name the file, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvspn.models.validation import ModelError, reason


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError or ValueError, naming the file, for anything else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name}: must be a JSON object, got {type(content).__name__}")
    return content


def read_pickle(file: Path) -> Mapping[str, Any]:
    """What torch.save has written, tensors alone: a pickle that would run code is refused.

    The tensors are mapped, not read, where the file is of the present format.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # which files of before torch 1.6 do not support
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file.name}: must hold tensors alone, and holds what could run code: refused"
        ) from error
    except Exception as error:
        raise ModelError(f"{file.name}: cannot be read: {reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{file.name}: must hold tensors by name, got {type(content).__name__}")
    return content


def tensors(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name. Raises ModelError for one larger than what is stored."""
    found = {str(name): each for name, each in content.items() if isinstance(each, Tensor)}
    for name, each in found.items():
        if (
            each.layout != torch.strided
            or each.numel() * each.element_size() > each.untyped_storage().nbytes()
        ):
            raise ModelError(f"{file.name}: {name} must be a plain tensor, got one without all its numbers")
    return found
