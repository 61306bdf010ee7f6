"""Whisper in the formats that people have it in: a file here reads each, `open_checkpoint` finds which."""

from __future__ import annotations

from pathlib import Path

from kvspn.models.checkpoints import ctranslate2, hub, hugging_face, openai, packages
from kvspn.models.checkpoints.checkpoint import Checkpoint
from kvspn.models.checkpoints.files import read_json
from kvspn.models.validation import ModelError

__all__ = ["Checkpoint", "model_type", "open_checkpoint", "resolve"]

_GGML = (b"lmgg", b"GGUF")


def resolve(name: str | Path) -> Path | str:
    """A local folder or file; or the name of an installed package's model.

    Args:
        name: a folder, OpenAI's .pt file, a name of `kvspn.models.checkpoints.packages`, or a model hub's id,
            which is downloaded where it is not in the local cache.

    Raises:
        ModelError: it is none of these.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) in packages.PACKAGED:
        return str(name)
    if hub.ID.fullmatch(str(name)):
        return hub.folder(str(name))
    raise ModelError("no such model folder")


def model_type(folder: Path) -> str | None:
    """What config.json calls the network; None where there is no such file, or it does not say."""
    file = folder / "config.json"
    return read_json(file).get("model_type") if file.is_file() else None


def open_checkpoint(where: Path | str) -> Checkpoint:
    """Reads a Whisper of any format: what `resolve` gives.

    Hugging Face (safetensors, whole or in parts, or pytorch_model.bin), CTranslate2, OpenAI's .pt. No file's
    code is run, and nothing larger than the files is allocated.

    Raises:
        ModelError, ValueError, OSError: naming the file, for what is missing, damaged or of another network.
    """
    if isinstance(where, str):
        return ctranslate2.read(*packages.checked_files(where))
    if where.is_file():
        with where.open("rb") as file:
            if file.read(4) in _GGML:
                raise ModelError(
                    "a file of whisper.cpp, which is not read here: give the model that it was made of"
                )
        return openai.read(where, packages.tokenizers())
    kind = model_type(where)
    if kind == "whisper":
        return hugging_face.read(where)
    if kind is None and (where / ctranslate2.FILE).is_file():
        return ctranslate2.read(where)
    if (where / "config.json").is_file():
        # A whisperM2M is no checkpoint of Whisper: who opens one has asked for it before.
        wanted = "'whisper'" if kind == "whisper_m2m" else "'whisper_m2m' or 'whisper'"
        raise ModelError(f"model type {kind!r}, must be {wanted}")
    files = sorted(where.glob("*.pt"))
    if len(files) == 1:
        return openai.read(files[0], packages.tokenizers())
    raise ModelError(
        "the configuration is missing (config.json), "
        f"nor is there CTranslate2's {ctranslate2.FILE} or OpenAI's .pt"
    )
