"""Recordings with what is said in them: a manifest of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ManifestError(ValueError):
    """A manifest that cannot be used: one line that names the file, its line, and what is wrong there."""


@dataclass(frozen=True)
class Recording:
    """One clip: `name` is its path in the manifest, `place` the manifest and the line that it stands in.

    text: what is said, empty where it need not be told; translation: the same in English, and speaker and
    seconds, where the manifest has them.
    """

    place: str
    name: str
    audio: Path
    language: str
    text: str
    translation: str | None
    speaker: str | None = None
    seconds: float | None = None


def read_recordings(
    manifest: Path, split: str | None = None, languages: Collection[str] = (), texts: bool = True
) -> list[Recording]:
    """The clips of a manifest, in its order.

    Args:
        manifest: a file with one JSON object a line: `path` (from the manifest's folder), `language` (its
            code), `text`, on request `translation`, `split`, `speaker` and `seconds`.
        split: only clips of which this is the `split`, or else the first folder of the path.
        languages: only clips in these; all where there are none.
        texts: whether each clip must have a text.

    Raises:
        ManifestError: no such file, a line that is not such an object, audio that is not there, a clip
            without a text, no clips.
    """
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{manifest}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    clips = []
    for number, line in enumerate(lines, 1):
        place = f"{manifest}, line {number}"
        if not line.strip():
            continue
        entry = _entry(place, line)
        part = entry.get("split") or Path(entry["path"]).parts[0]
        if split in (None, part) and (not languages or entry["language"] in languages):
            text = _text(place, entry, "text") if texts or entry.get("text") else ""
            audio = manifest.parent / entry["path"]
            if not audio.is_file():
                raise ManifestError(f"{place}: {audio}: no such file")
            translation = None if entry.get("translation") is None else _text(place, entry, "translation")
            speaker = None if entry.get("speaker") is None else _text(place, entry, "speaker")
            seconds = entry.get("seconds")
            if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
                raise ManifestError(f"{place}: seconds must be a positive number, got {json.dumps(seconds)}")
            clips.append(
                Recording(place, entry["path"], audio, entry["language"], text, translation, speaker, seconds)
            )
    if not clips:
        wanted = [f"split {split!r}"] * (split is not None) + [f"language {each!r}" for each in languages]
        raise ManifestError(f"{manifest}: no clips{' of ' * bool(wanted)}{', '.join(wanted)}")
    return clips


def _entry(place: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{place}: must be a JSON object: {error.msg}, column {error.colno}") from error
    if not isinstance(entry, dict):
        raise ManifestError(f"{place}: must be a JSON object, got {line[:40]}")
    for name in ("path", "language"):
        _text(place, entry, name)
    return entry


def _text(place: str, entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{place}: {name} must be a text, got {json.dumps(value)}")
    return value
