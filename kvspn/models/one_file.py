"""A model as one file for programs without Python: see examples/embed_c."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvspn.atomic import atomic
from kvspn.models.weights import decoder_weights, encoder_weights
from kvspn.weights.decoder import named_tensors
from kvspn.weights.formats import quantise


def export(model: Any, processor: Any, path: Path, weights: str | None = None) -> None:
    """Writes all that speech translation needs, as safetensors; a draft network only if it has been trained.

    The decoder and the draft network have the names of csrc/include/kvspn.h; the rest is
    `mel_filters` [mel bins, n_fft / 2 + 1], `encoder.*` in fp32 (see `encoder_weights`), the additive masks
    `mask` and `first_mask` [V] of all tokens and of the first, and the UTF-8 of token i at
    `vocabulary.ends` [V] i - 1 to i of `vocabulary.bytes`. The metadata holds the numbers of the engine's
    params, of the features and of the prompt.

    Args:
        model, processor: as `kvspn.models.folder.open_model` gives them.
        weights: the format of the decoder's (see `kvspn.weights.formats.quantise`); None leaves them.
    """
    if getattr(model.generation_config, "is_multilingual", True) is False:
        raise ValueError(
            "model must know languages, which the file's prompt is made of; got an English-only one"
        )
    decoder = decoder_weights(model)
    if not model.drafts:
        decoder = replace(decoder, blocks=(), groups=0, draft_norm=None, draft_head=None, draft_ids=None)
    if weights is not None:
        decoder = quantise(decoder, weights)
    config, ids, features = model.config, model.generation_config, processor.feature_extractor
    mask, first = torch.zeros(2, config.vocab_size)
    mask[ids.suppress_tokens or []] = -torch.inf
    first[ids.begin_suppress_tokens or []] = -torch.inf
    pieces = _vocabulary(processor.tokenizer, config.vocab_size)
    tensors = dict(named_tensors(decoder)) | encoder_weights(model)
    tensors |= {
        "mel_filters": torch.from_numpy(features.mel_filters).T.float(),
        "mask": mask,
        "first_mask": mask + first,
        "vocabulary.bytes": torch.tensor(list(b"".join(pieces)), dtype=torch.uint8),
        "vocabulary.ends": torch.tensor([len(piece) for piece in pieces]).cumsum(0).to(torch.int32),
    }
    numbers = {
        "layers": len(decoder.layers),
        "heads": decoder.heads,
        "blocks": len(decoder.blocks),
        "groups": max(decoder.groups, 1),
        "last_layer_only": int(decoder.last_layer_only),
        "encoder_stride": decoder.encoder_stride,
        "encoder_layers": config.encoder_layers,
        "encoder_heads": config.encoder_attention_heads,
        "encoder_output_positions": int(getattr(config, "encoder_output_positions", False)),
        "samples": features.n_samples,
        "hop": features.hop_length,
        "eos": config.eos_token_id,
        "start": config.decoder_start_token_id,
        "no_timestamps": ids.no_timestamps_token_id,
        # Whether the target follows the task in the prompt; a Whisper translates to English alone, without.
        "target_follows_task": int(config.target_languages is None or bool(config.target_languages)),
        **ids.task_to_id,
        **{f"language.{token.strip('<|>')}": i for token, i in ids.lang_to_id.items()},
    }
    # Tied tensors are written twice: a copy each.
    copies: dict[str, Tensor] = {
        name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()
    }
    with atomic(path) as part:
        save_file(copies, part, {name: str(number) for name, number in numbers.items()})


def _vocabulary(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer; none for special ones."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    special = tokenizer.added_tokens_decoder
    pieces = (None if i in special else tokenizer.convert_ids_to_tokens(i) for i in range(size))
    return [bytes(alphabet[char] for char in piece or "") for piece in pieces]
