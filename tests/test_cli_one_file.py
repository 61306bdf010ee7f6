"""`kvspn transcribe` and `translate` with a model in one file: the C++ library hears, torch stays out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from kvspn import assets
from kvspn.engines import backends
from kvspn.speech.audio import load_audio
from support import tiny
from support.commands import assert_one_line, kvspn_

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


def quantize(folder: Path, file: Path) -> Path:
    made = kvspn_("quantize", file, "--model", folder, "--weights", "fp32")
    assert made.exit_code == 0, made.output
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Whisper with timestamps."""
    folder = tiny.save_whisper(tmp_path_factory.mktemp("whisper"), timestamps=True)
    return quantize(folder, folder.with_name("one.safetensors"))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(assets.bundled_model(), tmp_path_factory.mktemp("mini") / "mini.safetensors")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "clip.wav", tiny.sound(7.3), 16_000)
    return tmp_path / "clip.wav"


def test_segments_are_those_of_the_library(file: Path, clip: Path) -> None:
    from kvspn import _native

    segments = _native.Model(str(file)).transcribe(load_audio(clip), language="de", target="en")
    result = kvspn_("translate", clip, "--from", "de", "--model", file, "--output", "json")
    assert result.exit_code == 0, result.stderr
    (document,) = json.loads(result.stdout)
    said = [(each["start"], each["end"], each["text"], each["tokens"]) for each in document["segments"]]
    assert said == [(each.start, each.end, each.text, each.tokens) for each in segments]
    assert len(said) >= 4
    assert (document["source"], document["target"]) == ("de", "en")
    assert document["language_probabilities"] == [{"de": 1.0}]
    assert document["stats"]["tokens"] == document["stats"]["steps"] > len(segments)
    cut = [line for line in document["warnings"] if "is cut short" in line]
    assert len(cut) == sum(each.cut for each in segments)
    assert all(line in result.stderr for line in cut)
    times = kvspn_("translate", clip, "--from", "de", "--model", file, "--output", "tsv").stdout.splitlines()
    assert len(times) == 1 + len(segments)


@pytest.mark.parametrize("command", [("transcribe",), ("translate", "--to", "de"), ("translate",)])
def test_the_miniature_says_what_it_says_from_its_folder(miniature: Path, command: tuple[str, ...]) -> None:
    clip = min((Path(assets.__file__).parent / "speech" / "demo").glob("*-es.ogg"))
    name, *options = command
    by_folder = kvspn_(name, clip, *options)
    by_file = kvspn_(name, clip, *options, "--model", miniature)
    assert by_file.stdout == by_folder.stdout != "\n"
    assert by_file.stderr == by_folder.stderr == ""


def test_the_miniature_warns_of_other_speech(miniature: Path, clip: Path) -> None:
    result = kvspn_("transcribe", clip, "--model", miniature)
    assert result.exit_code == 0
    assert "this model knows one phrasebook" in result.stderr


def test_without_torch(file: Path, clip: Path) -> None:
    """Neither it nor transformers is imported: a process would wait for them longer than it hears."""
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from kvspn.cli import app
app(["transcribe", {str(clip)!r}, "--model", {str(file)!r}])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--words", "--output", "json"), "--words must be left out for a model in one file"),
        (("--k", "3"), "--k must be left out for a model in one file (one.safetensors), got 3"),
        (("--no-draft",), "--no-draft must be left out"),
        (("--prompt", "A"), "--prompt must be left out"),
        (("--weights", "int8"), "--weights must be left out"),
        (("--encoder-format", "int8"), "--encoder-format must be left out"),
        (("--backend", "native"), "--backend must be left out"),
        (("--live", "1"), "--live must be left out for a model in one file, got 1"),
        (("--from", "xx"), "--from must be one of"),
    ],
)
def test_what_it_does_not_honour_is_refused(
    file: Path, clip: Path, options: tuple[str, ...], message: str
) -> None:
    assert_one_line(kvspn_("transcribe", clip, "--model", file, *options), message)


def test_a_whisper_translates_to_english_alone(file: Path, clip: Path) -> None:
    assert_one_line(
        kvspn_("translate", clip, "--to", "de", "--model", file), "--to must be one of en, got de"
    )


def test_no_times_where_the_model_has_none(miniature: Path, clip: Path) -> None:
    result = kvspn_("transcribe", clip, "--model", miniature, "--output", "srt")
    assert_one_line(result, "--output must be txt or json for this model, which has no timestamps; got srt")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_a_damaged_file_is_an_error_that_names_the_option(tmp_path: Path, clip: Path, damage: bytes) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(damage)
    assert_one_line(kvspn_("transcribe", clip, "--model", file), f"--model {file}: ")
