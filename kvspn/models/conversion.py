"""From Whisper to whisperM2M: prune the decoder, add a text encoder and KVSPN (arXiv 2508.11189)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import WhisperForConditionalGeneration

from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.modeling import WhisperM2MForConditionalGeneration

_DECODER_LAYER = "model.decoder.layers."
_ADDED = ("model.text_encoder.", "kvspn.")


def spread_layers(available: int, kept: int) -> list[int]:
    """`kept` of `available` layers, evenly spaced, first and last among them (the paper is silent)."""
    if not 1 <= kept <= available:
        raise ValueError(f"decoder layers to keep must be 1 to {available}, got {kept}")
    return [round(i * (available - 1) / max(kept - 1, 1)) for i in range(kept)]


def fitting_groups(layers: int, blocks: int | None = None) -> int:
    """Three groups as in the paper, or the most below that divide the decoder's layers and the blocks."""
    return next(groups for groups in (3, 2, 1) if not layers % groups and not (blocks or 0) % groups)


def convert_whisper(
    whisper: WhisperForConditionalGeneration | WhisperM2MForConditionalGeneration,
    layers: Sequence[int],
    **added: Any,
) -> WhisperM2MForConditionalGeneration:
    """Keeps the encoder, the embeddings and the named decoder layers; what is added starts at random.

    Args:
        whisper: any Hugging Face Whisper, or one that `kvspn.models.folder.open_whisper` has opened.
        layers: decoder layers to keep, ascending.
        added: fields of WhisperM2MConfig for the text encoder and KVSPN. Groups and blocks that are not given
            fit the number of layers: as many as `fitting_groups` says. `target_languages` is empty where it
            is not given, as the prompt that names a target is yet to be taught.

    Raises ValueError for layers that do not exist or are out of order.
    """
    available = whisper.config.decoder_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= available:
        raise ValueError(f"layers must be ascending, each 0 to {available - 1}, got {list(layers)}")
    settings = whisper.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    groups = added.get("kvspn_groups") or fitting_groups(len(layers), added.get("kvspn_blocks"))
    fitting: dict[str, Any] = {"kvspn_groups": groups, "kvspn_blocks": groups, "target_languages": []}
    config = WhisperM2MConfig(**{**settings, "decoder_layers": len(layers), **fitting, **added})
    model = WhisperM2MForConditionalGeneration(config).to(whisper.dtype)
    state = {_rename(name, layers): weight for name, weight in whisper.state_dict().items()}
    state.pop("", None)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(_ADDED)]
    if missing or unexpected:
        raise ValueError(f"not a Whisper checkpoint: missing {missing}, unexpected {unexpected}")
    model.generation_config = copy.deepcopy(whisper.generation_config)
    if heads := getattr(whisper.generation_config, "alignment_heads", None):
        kept = [[layers.index(layer), head] for layer, head in heads if layer in layers]
        model.generation_config.alignment_heads = kept or None
    if model.kvspn is not None:
        model.kvspn.start_from(model.model.decoder)
    return model


def _rename(name: str, layers: Sequence[int]) -> str:
    """The name of a weight after pruning; empty for a dropped layer."""
    if not name.startswith(_DECODER_LAYER):
        return name
    index, rest = name[len(_DECODER_LAYER) :].split(".", 1)
    return f"{_DECODER_LAYER}{layers.index(int(index))}.{rest}" if int(index) in layers else ""
