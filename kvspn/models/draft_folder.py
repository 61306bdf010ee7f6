"""A draft network by itself: a folder with its weights and configuration, bound to its base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvspn.atomic import atomic
from kvspn.models.checkpoints.files import read_json
from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.kvspn_network import KVSPN
from kvspn.models.validation import ModelError, check_weights, reason

if TYPE_CHECKING:
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration

MODEL_TYPE = "kvspn"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TRAINED = "kvspn_draft_trained"
_FIELDS = tuple(
    each.name for each in fields(WhisperM2MConfig) if each.name.startswith("kvspn_") and each.name != _TRAINED
)
_FORMS = ("float16", "int8")


def fingerprint(model: WhisperM2MForConditionalGeneration, form: str = "float16") -> str:
    """SHA-256 of the base's decoder and head, in hexadecimal, alike for every file of the same model.

    Args:
        form: "float16": of weights rounded to fp16, alike for files in fp32 and fp16; "int8": matrices as
            CTranslate2 rounds them, each row to 127 steps up to its largest, alike for the file that was
            rounded and for its int8 file.
    """
    parts = dict(model.model.decoder.named_parameters())
    if model.proj_out.weight is not model.model.decoder.embed_tokens.weight:
        parts["proj_out.weight"] = model.proj_out.weight
    digest = hashlib.sha256()
    for name, weight in sorted(parts.items()):
        rounded = weight.detach().cpu()
        if form == "int8" and weight.dim() == 2 and "positions" not in name:
            rounded = rounded.float()
            largest = rounded.abs().amax(1, keepdim=True)
            rounded = (rounded * (127 / largest.where(largest > 0, 127))).round().to(torch.int8)
        else:
            rounded = rounded.half()
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(rounded.contiguous().numpy().data)
    return digest.hexdigest()


def save_draft(
    model: WhisperM2MForConditionalGeneration, folder: Path, training: Mapping[str, Any] | None = None
) -> None:
    """Writes the model's draft network, in fp16, whole or not at all.

    Args:
        training: what to remember of how it was trained: recipe, figures.

    Raises ValueError for a model that has none.
    """
    if model.kvspn is None:
        raise ValueError("this model has no draft network (kvspn_blocks is 0)")
    config = {
        "model_type": MODEL_TYPE,
        **{name: getattr(model.config, name) for name in _FIELDS},
        "base": {form: fingerprint(model, form) for form in _FORMS},
        "training": dict(training or {}),
    }
    state = {
        name: (weight.half() if weight.is_floating_point() else weight).contiguous().cpu()
        for name, weight in model.kvspn.state_dict().items()
    }
    with atomic(folder) as part:
        part.mkdir()
        (part / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(state, part / _WEIGHTS)


def join_draft(model: WhisperM2MForConditionalGeneration, folder: Path) -> None:
    """Gives the model the draft network of a folder, in place of one that it has.

    Raises:
        ModelError: naming the folder: it holds no draft network, one that cannot be read, or that of another
            base model.
    """
    try:
        _join(model, folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    except Exception as error:  # damaged files fail in many ways, in several libraries
        raise ModelError(f"{folder}: cannot be read: {reason(error)}") from error


def _join(model: WhisperM2MForConditionalGeneration, folder: Path) -> None:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"no draft network, as kvspn train draft writes it: {name} is missing")
    said = read_json(folder / _CONFIG)
    if said.get("model_type") != MODEL_TYPE:
        raise ModelError(f"{_CONFIG}: model_type must be {MODEL_TYPE!r}, got {said.get('model_type')!r}")
    known = said.get("base")
    if not isinstance(known, Mapping) or not any(
        known.get(form) == fingerprint(model, form) for form in _FORMS
    ):
        raise ModelError(
            f"{_CONFIG}: base must be the fingerprint of this model, got that of another one: a draft "
            "network reads the keys and values of the model that it was trained on"
        )
    chosen = {name: said[name] for name in _FIELDS if name in said}
    for name, value in chosen.items():
        if not isinstance(value, int | None):
            raise ModelError(f"{_CONFIG}: {name} must be a number, true, false or null, got {value!r}")
    if not chosen.get("kvspn_blocks"):
        raise ModelError(f"{_CONFIG}: kvspn_blocks must be at least 1, got {chosen.get('kvspn_blocks')}")
    chosen[_TRAINED] = True
    config = WhisperM2MConfig.from_dict(model.config.to_dict() | chosen)
    with torch.device("meta"):
        network = KVSPN(config)
    network.load_state_dict(_read(folder / _WEIGHTS, network, model.dtype), assign=True)
    for name, value in chosen.items():
        setattr(model.config, name, value)
    model.kvspn = network.to(model.device).eval()
    check_weights(model)


def _read(file: Path, network: KVSPN, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a draft network, in `dtype`, its draft vocabulary as it is."""
    wanted = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    with safe_open(file, "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        for name in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(name) != shapes.get(name):
                raise ModelError(
                    f"{file.name}: {name} must be {_shape(wanted.get(name))}, as {_CONFIG} says, "
                    f"got {_shape(shapes.get(name))}"
                )
        state = {name: opened.get_tensor(name) for name in wanted}
    for name, weight in state.items():
        if weight.is_floating_point() != (name != "draft_ids"):
            raise ModelError(f"{file.name}: {name} must not be {weight.dtype}")
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
