"""Opening a model, whatever its files are, with one clear line for what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from kvspn.assets import PARTS, missing_part
from kvspn.models.checkpoints import Checkpoint, model_type, open_checkpoint, resolve
from kvspn.models.checkpoints.files import read_json
from kvspn.models.checkpoints.hugging_face import weight_files
from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.draft_folder import join_draft
from kvspn.models.modeling import WhisperM2MForConditionalGeneration
from kvspn.models.processing import WhisperM2MFeatureExtractor, WhisperM2MProcessor
from kvspn.models.validation import (
    ModelError,
    check_config,
    check_features,
    check_generation,
    check_processor,
    check_weights,
    reason,
)

__all__ = ["ModelError", "open_model", "open_whisper"]


def open_model(
    name: str | Path, dtype: torch.dtype | str = "auto", draft: str | Path | None = None
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor.

    All that its files say is held against each other before anything is built, the weights' values after.

    Args:
        name: the folder of a whisperM2M, or a Whisper as `kvspn.models.checkpoints` reads it: a Hugging Face
            or CTranslate2 folder, OpenAI's .pt file, a model hub's id, or the name of an installed package's
            ("whisper-base"). A Whisper becomes a whisperM2M without text encoder and draft network.
        dtype: of the weights in memory; "auto" keeps the files'.
        draft: the folder of a draft network that was trained for this model (`kvspn train draft`); None is
            the model's own, if it has one.

    Raises:
        ModelError: naming it: no such model, a missing part, another kind of model, files that cannot be
            read, or that do not fit each other; a draft network of another model.
    """
    model, processor = _open(
        name, lambda where: _open_folder(where, dtype) if _is_m2m(where) else _open_whisper(where, dtype)
    )
    if draft is not None:
        join_draft(model, Path(draft))
    return model, processor


def open_whisper(name: str | Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """The same for a Whisper alone. Raises ModelError for a whisperM2M, too."""
    return _open(name, lambda where: _open_whisper(where, dtype))


def _open(name: str | Path, read: Callable[[Path | str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """`read` of what `name` is, whatever goes wrong as one line that begins with the name."""
    try:
        return read(resolve(name))
    except ModelError as error:
        whole = str(error)
        raise ModelError(whole if whole.startswith(f"{name}: ") else f"{name}: {whole}") from error
    except Exception as error:  # damaged files fail in many ways, in several libraries
        raise ModelError(f"{name}: cannot be read: {reason(error)}") from error


def _is_m2m(where: Path | str) -> bool:
    return isinstance(where, Path) and where.is_dir() and model_type(where) == WhisperM2MConfig.model_type


def _open_folder(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """A whisperM2M."""
    if (missing := missing_part(folder)) is not None:
        raise ModelError(missing.removeprefix(f"{folder}: "))
    config = WhisperM2MConfig.from_dict(read_json(folder / "config.json"))
    check_config(config, _shapes(folder))
    check_generation(read_json(folder / "generation_config.json"), config)
    single, joint = (folder / file for file in PARTS["preprocessor"])
    check_features(read_json(single) if single.is_file() else read_json(joint)["feature_extractor"], config)
    model, report = WhisperM2MForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(f"the weights lack {len(lacking)} tensors, such as {lacking[0]}")
    check_weights(model)
    processor = WhisperM2MProcessor.from_pretrained(folder, local_files_only=True)
    check_processor(processor, config)
    return model.eval(), processor


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, from the headers of the safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with safe_open(file, "np") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def _open_whisper(where: Path | str, dtype: Any) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(where)
    config = WhisperM2MConfig(**checkpoint.config, text_encoder_layers=0, kvspn_blocks=0, target_languages=[])
    check_config(
        config, {name: tuple(weight.shape) for name, weight in checkpoint.weights.items()}, checkpoint.file
    )
    check_generation(checkpoint.generation, config, english_only=True)
    positions = config.max_source_positions
    window = {"feature_size": config.num_mel_bins, "chunk_length": positions // 50, **checkpoint.features}
    check_features(window, config)
    model = _build(config, checkpoint, dtype)
    model.generation_config = GenerationConfig.from_dict(dict(checkpoint.generation))
    # As in `adjust_generation_fn`: said outright, or transformers' pipeline asks for beams.
    model.generation_config.num_beams = model.generation_config.num_beams or 1
    check_weights(model)
    processor = WhisperM2MProcessor(WhisperM2MFeatureExtractor.from_dict(window), checkpoint.tokenizer)
    check_processor(processor, config)
    return model.eval(), processor


def _build(
    config: WhisperM2MConfig, checkpoint: Checkpoint, dtype: Any
) -> WhisperM2MForConditionalGeneration:
    """The network around the checkpoint's weights, which it takes from there."""
    with torch.device("meta"):
        model = WhisperM2MForConditionalGeneration(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    weights, head = checkpoint.weights, "proj_out.weight"
    if tied := config.tie_word_embeddings or head not in weights:
        weights.pop(head, None)
        wanted.pop(head)
    for what, names in (
        ("lack", wanted.keys() - weights.keys()),
        ("hold unknown", weights.keys() - wanted.keys()),
    ):
        if names:
            raise ModelError(f"the weights {what} {len(names)} tensors, such as {min(names)}")
    state: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        weight = weights.pop(name)
        if tuple(weight.shape) != shape:
            raise ModelError(
                f"{name} must be {list(shape)}, as the configuration says, got {list(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise ModelError(f"{name} must be in floating point, got {weight.dtype}")
        state[name] = weight.to(weight.dtype if dtype == "auto" else dtype)
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        model.proj_out.weight = model.model.decoder.embed_tokens.weight
    return model
