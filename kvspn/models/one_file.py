"""A model as one file for programs without Python: see examples/embed_c."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvspn.atomic import atomic
from kvspn.models.checkpoints.vocabulary import NO_SPEECH, not_speech, token_bytes
from kvspn.models.prompts import language_ids
from kvspn.models.weights import decoder_weights, encoder_weights
from kvspn.weights.decoder import named_tensors
from kvspn.weights.formats import quantise

_ENCODER_FORMATS = {"fp32": 0, "bf16": 1, "int8": 3}  # of a kvspn_dtype


def export(
    model: Any, processor: Any, path: Path, weights: str | None = None, encoder_format: str = "fp32"
) -> None:
    """Writes all that speech to text needs, as safetensors; a draft network only if it has been trained.

    The decoder and the draft network have the names of csrc/include/kvspn.h; the rest is `encoder.*` in fp32
    (see `encoder_weights`), the additive masks `mask` and `first_mask` [V] of all tokens and of a window's
    first, and the UTF-8 of token i at `vocabulary.ends` [V] i - 1 to i of `vocabulary.bytes`. The metadata
    holds numbers: of the engine's and the encoder's params, and the tokens that a prompt is made of, of each
    language under `language.` and its code, and under `target.` of those that a text can be translated to.

    Args:
        model, processor: as `kvspn.models.folder.open_model` gives them.
        weights: the format of the decoder's (see `kvspn.weights.formats.quantise`); None leaves them.
        encoder_format: what the speech encoder's are multiplied in: "fp32", "bf16" or "int8".

    Raises ValueError that names the argument.
    """
    if encoder_format not in _ENCODER_FORMATS:
        raise ValueError(
            f"encoder_format must be one of {', '.join(_ENCODER_FORMATS)}, got {encoder_format!r}"
        )
    decoder = decoder_weights(model)
    if not model.drafts:
        decoder = replace(decoder, blocks=(), groups=0, draft_norm=None, draft_head=None, draft_ids=None)
    if weights is not None:
        decoder = quantise(decoder, weights)
    config, said, tokenizer = model.config, model.generation_config.to_dict(), processor.tokenizer
    languages, known = language_ids(said), tokenizer.get_vocab()
    suppressed, blank = said.get("suppress_tokens") or [], said.get("begin_suppress_tokens") or []
    if config.vocab_size > said["no_timestamps_token_id"] + 1:  # timestamps: heard as WhisperModel does it
        suppressed = not_speech(tokenizer)
        blank = [*tokenizer.encode(" ", add_special_tokens=False)[:1], config.eos_token_id]
    mask, first = torch.zeros(2, config.vocab_size)
    mask[suppressed], first[blank] = -torch.inf, -torch.inf
    pieces = token_bytes(tokenizer, config.vocab_size)
    tensors = dict(named_tensors(decoder)) | encoder_weights(model)
    tensors |= {
        "mask": mask,
        "first_mask": mask + first,
        "vocabulary.bytes": torch.tensor(list(b"".join(pieces)), dtype=torch.uint8),
        "vocabulary.ends": torch.tensor([len(piece) for piece in pieces]).cumsum(0).to(torch.int32),
    }
    taught = config.target_languages
    targets = languages if taught is None else taught or [code for code in ("en",) if code in languages]
    numbers: dict[str, int | str] = {
        "layers": len(decoder.layers),
        "heads": decoder.heads,
        "blocks": len(decoder.blocks),
        "groups": max(decoder.groups, 1),
        "last_layer_only": int(decoder.last_layer_only),
        "encoder_stride": decoder.encoder_stride,
        "encoder_layers": config.encoder_layers,
        "encoder_heads": config.encoder_attention_heads,
        "encoder_format": _ENCODER_FORMATS[encoder_format],
        "encoder_output_positions": int(getattr(config, "encoder_output_positions", False)),
        "eos": config.eos_token_id,
        "start": said.get("decoder_start_token_id") or config.decoder_start_token_id,
        "no_timestamps": said["no_timestamps_token_id"],
        "no_speech": next((known[each] for each in NO_SPEECH if each in known), -1),
        # Whether the target follows the task in the prompt; a Whisper translates to English alone, without.
        "target_follows_task": int(taught is None or bool(taught)),
        "training_domain": getattr(config, "training_domain", None) or "",
        **{f"task.{task}": i for task, i in (said["task_to_id"] if languages else {}).items()},
        **{f"language.{code}": i for code, i in languages.items()},
        **{f"target.{code}": languages[code] for code in targets},
    }
    # Tied tensors are written twice: a copy each.
    copies: dict[str, Tensor] = {
        name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()
    }
    with atomic(path) as part:
        save_file(copies, part, {name: str(number) for name, number in numbers.items()})
