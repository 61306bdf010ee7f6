"""What `kvspn translate` and `kvspn transcribe` share: audio files in, text out, terminals and streams."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import kvspn
from kvspn import assets
from kvspn.speech.translator import Translator
from support.commands import assert_one_line, kvspn_
from support.tiny import damaged, sound

STATS = {"tokens", "steps", "drafted", "accepted", "acceptance", "tokens_per_step", "alpt_ms", "seconds"}

pytestmark = pytest.mark.usefixtures("use_root")


def test_translate_prints_the_text(clip: Path, root: Path) -> None:
    text = Translator.from_folder().translate(sound(1), "de").text
    for arguments in ((), ("--no-draft",), ("--model", root / "mini")):
        result = kvspn_("translate", clip, "--to", "de", *arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.strip() == text.strip()


@pytest.mark.parametrize("arguments", [("--weights", "int8"), ("--backend", "reference"), ("--kv", "int8")])
def test_translate_on_another_backend_or_format(clip: Path, arguments: tuple[str, ...]) -> None:
    result = kvspn_("translate", clip, "--to", "de", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "int3"), "weights must be one of fp32, bf16, fp16, fp8, int8, int4, or two"),
        (("--backend", "cublas"), "got 'cublas'"),
        (("--kv", "int4"), "kv must be int8, or None for the embeddings' dtype, got 'int4'"),
    ],
)
def test_translate_refuses(clip: Path, arguments: tuple[str, ...], message: str) -> None:
    assert_one_line(kvspn_("translate", clip, "--to", "de", *arguments), message)


def test_translate_json(tmp_path: Path, clip: Path) -> None:
    soundfile.write(tmp_path / "long.mp3", np.stack([sound(5, i, 44_100) for i in range(2)], axis=1), 44_100)
    soundfile.write(
        tmp_path / "stereo.flac", np.stack([sound(1, i, 44_100) for i in range(2)], axis=1), 44_100
    )
    files = [str(clip), str(tmp_path / "long.mp3"), str(tmp_path / "stereo.flac")]
    result = kvspn_("translate", *files, "--to", "zh", "--from", "en", "--k", "2", "--output", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    documents = json.loads(result.stdout)
    assert [document["file"] for document in documents] == files
    for document in documents:
        assert document.pop("language_probabilities") == []  # the language was given
        assert document.pop("segments") == []  # of a model without timestamps
        assert set(document) == {"file", "source", "sources", "target", "text", "warnings", "stats"}
        assert (document["source"], document["target"]) == ("en", "zh")
        assert (set(document["sources"]), document["warnings"]) == ({"en"}, [])
        assert set(document["stats"]) == STATS
    assert documents[1]["stats"]["tokens"] > documents[0]["stats"]["tokens"]


def test_faults_every_file_has_its_result_or_its_error(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.wav"
    cut.write_bytes(clip.read_bytes()[:20_000])
    soundfile.write(tmp_path / "strange.wav", sound(0.5), 16_000)
    translate = Translator.translate

    def fails(self: Translator, samples: np.ndarray, *args: object, **options: object) -> object:
        if len(samples) == 8_000:
            raise KeyError("a bug")
        return translate(self, samples, *args, **options)

    monkeypatch.setattr(Translator, "translate", fails)
    (empty := tmp_path / "empty").mkdir()
    files = [tmp_path / "none.wav", clip, tmp_path / "strange.wav", empty, cut]
    result = kvspn_("translate", *files, "--to", "de")
    assert result.exit_code == 3
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [str(clip), str(cut)]
    missing, strange, folder, damage = result.stderr.splitlines()
    assert f"{files[0]}: no such file" in missing
    assert f"{files[2]}: KeyError: 'a bug'" in strange
    assert f"{empty}: no audio files in it (aac, " in folder
    assert f"{cut}: ends after 0.6 of 1.0 seconds" in damage

    result = kvspn_("translate", *files, "--to", "de", "--output", "json", "--strict")
    assert result.exit_code == 4
    documents = json.loads(result.stdout)
    assert [document["file"] for document in documents] == list(map(str, files))
    assert [set(document) == {"file", "error"} for document in documents] == [True, False, True, True, True]
    assert documents[4]["error"] == f"{cut}: ends after 0.6 of 1.0 seconds"


def test_faults_the_exit_status_has_an_end(tmp_path: Path) -> None:
    result = kvspn_("translate", *[tmp_path / "none.wav"] * 256, "--to", "de", "--output", "json")
    assert (result.exit_code, len(json.loads(result.stdout))) == (100, 256)


def test_faults_ctrl_c_leaves_whole_json(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    translate = Translator.translate

    def interrupted(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return translate(*args, **options)

    monkeypatch.setattr(Translator, "translate", interrupted)
    result = kvspn_("translate", clip, clip, clip, "--to", "de", "--output", "json")
    assert (result.exit_code, len(json.loads(result.stdout))) == (130, 1)


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell command in a folder, in which kvspn is `$K`."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        env={
            **os.environ,
            "K": f"{sys.executable} -m kvspn translate --model {assets.ROOT / 'mini'} --from en",
            "PYTHONPATH": str(Path(kvspn.__file__).parents[1]),
            **environment,
        },
        check=False,
    )


def test_faults_any_terminal_encoding_and_file_name(tmp_path: Path, clip: Path) -> None:
    name = os.fsdecode(b"latin\xe9 [b] \xe8\xaf\xad.wav")
    clip.rename(tmp_path / name)
    text = Translator.from_folder().translate(sound(1), "zh", "en").text
    for encoding in ("ascii", "cp1252"):
        done = run("$K latin* none.wav --to zh", tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
    begin = b"latin\xe9 [b] \\u8bed.wav: "
    assert done.stdout.rstrip() == (begin + text.encode("cp1252", "backslashreplace")).rstrip()
    done = run("$K latin* --to zh --output json", tmp_path, PYTHONIOENCODING="cp1252")
    (document,) = json.loads(done.stdout)
    assert (document["file"], document["text"]) == (name, text)


def test_faults_closed_streams_and_pipes(tmp_path: Path, clip: Path) -> None:
    text = Translator.from_folder().translate(sound(1), "de", "en").text.encode()
    for command in (
        "$K clip.wav --to de <&- 2>&-",
        "cat clip.wav | $K - --to de",
        "$K <(cat clip.wav) --to de",
    ):
        done = run(command, tmp_path)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, text, b"")
    done = run("set -o pipefail; $K clip.wav --to de | true", tmp_path)
    assert (done.returncode, done.stderr) == (1, b"")


def test_faults_the_miniature_says_what_it_knows(tmp_path: Path, clip: Path, root: Path) -> None:
    shutil.copytree(root / "mini", tmp_path / "narrow")
    config = json.loads((root / "mini/config.json").read_text())
    (tmp_path / "narrow/config.json").write_text(json.dumps(config | {"training_domain": "one phrasebook"}))
    bundled = root / "speech/demo/en.ogg"
    options = ("--to", "de", "--model", tmp_path / "narrow")
    assert kvspn_("translate", bundled, *options).stderr == ""
    (line,) = kvspn_("translate", bundled, clip, clip, *options).stderr.splitlines()
    assert f"{clip}: this model knows one phrasebook" in line
    mini = Path(kvspn.__file__).parent / "assets/mini/config.json"
    assert "phrasebook" in json.loads(mini.read_text())["training_domain"]


def test_faults_threads(clip: Path, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    assert kvspn_("translate", clip, "--to", "de", "--threads", 2).exit_code == 0
    assert torch.get_num_threads() == 2
    assert_one_line(kvspn_("translate", clip, "--to", "de", "--threads", 0), "--threads")


def test_translate_streams_to_a_terminal(tmp_path: Path, clip: Path, root: Path) -> None:
    terminal, stdout = pty.openpty()
    bad = damaged(tmp_path / "bad.mp3")  # FFmpeg would have a lot to say about it
    command = [sys.executable, "-m", "kvspn", "translate", clip, bad, "none.wav", "--to", "de"]
    done = subprocess.run(
        [*map(str, command), "--model", str(root / "mini")],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(kvspn.__file__).parents[1])},
        check=False,
    )
    os.close(stdout)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in shown.splitlines()] == [str(clip), str(bad)]
    summary, damage, _, error = done.stderr.decode().splitlines()
    assert "tokens in" in summary
    assert f"{bad}: ends after" in damage
    assert "none.wav: no such file" in error


def bad_audio(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.touch()
    elif kind == "corrupt":
        path.write_bytes(b"RIFF" + bytes(range(256)))
    elif kind != "missing":
        value = {"silence": 0, "nan": np.nan}[kind]
        soundfile.write(path, np.full(16_000, value, np.float32), 16_000, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("empty", "not a readable audio file"),
        ("corrupt", "not a readable audio file"),
        ("silence", "only silence"),
        ("nan", "NaN"),
    ],
)
def test_translate_bad_audio(tmp_path: Path, kind: str, message: str) -> None:
    assert_one_line(kvspn_("translate", bad_audio(tmp_path, kind), "--to", "de"), f"{kind}.wav", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "xx"], "unknown language 'xx': this model knows de, en, es, fr, it, zh"),
        (["--to", "de", "--from", "xx"], "unknown language 'xx'"),
        (["--to", "de", "--k", "0"], "whole number from 1, or inf"),
        (["--to", "de", "--k", "1.5"], "whole number from 1, or inf"),
        (["--to", "de", "--model", "/nowhere"], "/nowhere: no such model folder"),
        (["--to", "de", "--mode", "x"], "--mode"),
    ],
)
def test_translate_bad_options(clip: Path, arguments: list[str], message: str) -> None:
    assert_one_line(kvspn_("translate", clip, *arguments), message)


@pytest.mark.parametrize("part", assets.PARTS)
def test_translate_with_a_folder_that_lacks_a_part(tmp_path: Path, clip: Path, root: Path, part: str) -> None:
    shutil.copytree(root / "mini", tmp_path / "model")
    (tmp_path / "model" / assets.PARTS[part][0]).unlink()
    result = kvspn_("translate", clip, "--to", "de", "--model", tmp_path / "model")
    assert_one_line(result, str(tmp_path / "model"), f"the {part} is missing")
