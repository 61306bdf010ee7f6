"""What ships with the package: the miniature model, and speech to demonstrate and measure it.

mini/                           model folder of the miniature
speech/{demo,unseen,hard}/      manifest.json and the clips that it names, synthetic
speech/real/                    clips of Common Voice, CC0, and manifest.jsonl: speakers, sources, texts
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

ROOT = Path(str(resources.files(__name__)))
SETS = ("demo", "unseen", "hard")
PARTS = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "preprocessor": ("preprocessor_config.json", "processor_config.json"),
    "generation configuration": ("generation_config.json",),
}
"""The parts of a model's folder, and the files of which one must be there for each."""


@dataclass(frozen=True)
class SpokenSentence:
    """One clip: who speaks which sentence in which language, and the sentence in all languages."""

    id: str
    language: str
    audio: Path
    voice: str
    template: str
    texts: Mapping[str, str]


def bundled_model() -> Path:
    """The miniature's folder."""
    return ROOT / "mini"


def real_speech() -> Path:
    """The manifest of clips of real people (`kvspn.speech.manifest`)."""
    return ROOT / "speech" / "real" / "manifest.jsonl"


def missing_part(folder: Path) -> str | None:
    """What a model's folder lacks of PARTS, or that it is not there; None where it is whole."""
    if not folder.is_dir():
        return f"{folder}: no such model folder"
    for part, files in PARTS.items():
        if not any((folder / file).is_file() for file in files):
            return f"{folder}: the {part} is missing ({files[0]})"
    return None


def is_bundled(audio: Path) -> bool:
    """Whether a file is one of the clips that ship with the package."""
    return audio.resolve().is_relative_to((ROOT / "speech").resolve())


def read_manifest(name: str) -> list[SpokenSentence]:
    """The clips of one of SETS. Raises ValueError for another name, or where the set is not installed."""
    if name not in SETS:
        raise ValueError(f"set must be one of {', '.join(SETS)}, got {name!r}")
    folder = ROOT / "speech" / name
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such file; this installation lacks the set {name!r}")
    entries = json.loads(manifest.read_text("utf-8"))
    return [SpokenSentence(**{**entry, "audio": folder / entry["audio"]}) for entry in entries]
