"""Whispers of a model hub, by their ids: from the local cache where they are there, or downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvspn.models.checkpoints import ctranslate2, hugging_face
from kvspn.models.checkpoints.files import read_json
from kvspn.models.validation import ModelError, reason

ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = re.compile(
    r"(added_tokens|config|generation_config|preprocessor_config|processor_config|special_tokens_map"
    r"|tokenizer|tokenizer_config|vocab|vocabulary)\.json|merges\.txt|vocabulary\.txt"
)


def folder(name: str) -> Path:
    """The local folder of a model of the hub. Raises ModelError where it is neither here nor to be had."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        here = Path(snapshot_download(name, local_files_only=True))
        if whole(here):
            return here
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted(HfApi().list_repo_files(name))))
    except ModelError:
        raise
    except Exception as error:  # of several libraries: no such model, no network, no right to it
        raise ModelError(f"no such folder, and not to be had from the model hub: {reason(error)}") from error


def wanted(files: Iterable[str]) -> list[str]:
    """Of a model's files those to download: the weights once, in the best format that is there."""
    names = set(files)
    for file in (*hugging_face.WEIGHTS, ctranslate2.FILE):
        if file in names:
            weights = {file}
            if file.endswith(".index.json"):
                stem, suffix = file.removesuffix(".index.json").rsplit(".", 1)
                parts = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
                weights |= {name for name in names if parts.fullmatch(name)}
            return sorted(weights | {name for name in names if _SMALL.fullmatch(name)})
    raise ModelError(
        "holds no weights of a Whisper: safetensors, pytorch_model.bin or CTranslate2's model.bin"
    )


def whole(here: Path) -> bool:
    """Whether the cache holds all of a model, or only what someone else once wanted of it."""
    if not (here / "config.json").is_file():
        return False
    if (here / ctranslate2.FILE).is_file():
        return True
    try:
        return bool(hugging_face.weight_files(here))
    except (ModelError, ValueError):
        return False


def cached() -> Iterator[tuple[str, Path]]:
    """The Whispers of the local cache: ids and folders."""
    from huggingface_hub import constants

    for config in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json")):
        here = config.parent
        name = "/".join(config.parents[2].name.split("--")[1:])
        try:
            kind = read_json(config).get("model_type")
        except (ValueError, OSError):
            continue
        if whole(here) and (
            kind in ("whisper", "whisper_m2m") or (kind is None and (here / ctranslate2.FILE).is_file())
        ):
            yield name, here
