"""The command line on assets of our own.

conftest.py imports the fixtures, also where soundfile is not: each imports what it needs when a test asks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvspn import assets

if TYPE_CHECKING:
    from typer.testing import Result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Assets of our own: a tiny model, and test sets of noise."""
    import soundfile

    from support.tiny import TEXTS, save_model, sound

    root = tmp_path_factory.mktemp("assets")
    save_model(root / "mini")
    for name, spoken in (("demo", list(TEXTS)), ("unseen", ["en", "zh"]), ("hard", ["de"])):
        folder = root / "speech" / name
        folder.mkdir(parents=True)
        manifest = []
        for i, language in enumerate(spoken):
            soundfile.write(folder / f"{language}.ogg", sound(1, i), 16_000)
            manifest.append(
                {
                    "id": language,
                    "language": language,
                    "audio": f"{language}.ogg",
                    "voice": "noise",
                    "template": "station",
                    "texts": TEXTS,
                }
            )
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return root


@pytest.fixture
def use_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ROOT", root)


def kvspn_(*arguments: object) -> Result:
    from typer.testing import CliRunner

    from kvspn.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *parts: str) -> None:
    """One line of error on stderr, nothing on stdout, and a non-zero exit code."""
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvspn: ")
    for part in parts:
        assert part in line


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    import soundfile

    from support.tiny import sound

    soundfile.write(tmp_path / "clip.wav", sound(1), 16_000)
    return tmp_path / "clip.wav"
