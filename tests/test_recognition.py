"""`kvspn evaluate --speech`: manifests, error rates, the same clips through other runtimes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from kvspn.cli import app
from kvspn.models.conversion import convert_whisper
from kvspn.models.draft_folder import save_draft
from kvspn.models.folder import open_model, open_whisper
from kvspn.speech.manifest import Recording, read_recordings
from kvspn.speech.peers import as_whisper
from kvspn.speech.peers.transformers import Greedy
from kvspn.speech.recognition import Formats, judge
from kvspn.speech.translator import Translator
from support.tiny import TEXTS, WINDOW_SECONDS, save_model, save_whisper, sound

pytest.importorskip("jiwer")

ENTRY: dict[str, Any] = {"path": "eval/en.wav", "language": "en", "text": TEXTS["en"]}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips, and a manifest of two splits: two clips in each language, and one for training."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "eval").mkdir()
    lines = []
    for i, language in enumerate(("en", "zh", "en", "zh", "de")):
        name = f"eval/{i}-{language}.wav" if language != "de" else "train-de.wav"
        soundfile.write(folder / name, sound(1.0, i), 16_000)
        lines.append({"path": name, "language": language, "text": TEXTS[language]})
    lines[-1] |= {"split": "train", "translation": "Where is the station?"}
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    soundfile.write(folder / "eval/en.wav", sound(1.0), 16_000)
    soundfile.write(folder / "eval/long.wav", sound(WINDOW_SECONDS + 1), 16_000)
    (folder / "eval/noise.txt").write_text("no audio")
    return folder


@pytest.fixture
def run(whisper: Path, speech: Path) -> Callable[..., Result]:
    """`kvspn evaluate --speech MANIFEST --model WHISPER` and what follows."""

    def run(*arguments: object, manifest: Path = speech / "manifest.jsonl", model: Path = whisper) -> Result:
        words = ["evaluate", "--speech", manifest, "--model", model, *arguments]
        return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})

    return run


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code != 0 and result.stdout == "", result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert all(part in line for part in parts), line


def test_a_run_beside_transformers(run: Callable[..., Result], tmp_path: Path, monkeypatch) -> None:
    for name in ("faster_whisper", "pywhispercpp"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    result = run("--split", "eval", "--weights", "fp32,int4", "--peers", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "pip install faster-whisper" in result.stderr
    assert "pip install pywhispercpp" in result.stderr
    assert "en, WER" in result.stdout and "zh, CER" in result.stdout and "4 of 4" in result.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    systems = {system["name"]: system for system in document["systems"]}
    assert list(systems) == ["kvspn fp32", "kvspn int4", "transformers fp32"]
    assert systems["kvspn fp32"]["languages"] == systems["transformers fp32"]["languages"]
    assert systems["kvspn fp32"]["differences"] == systems["transformers fp32"]["differences"] == []
    assert systems["kvspn fp32"]["languages"]["en"]["clips"] == 2
    for each in systems["kvspn int4"]["differences"]:
        assert each["text"] != each["reference"] and each["margin"] >= 0
    counted = sum(score["identical"] for score in systems["kvspn int4"]["languages"].values())
    assert counted == 4 - len(systems["kvspn int4"]["differences"]) < 4
    assert document["machine"]["weights"] == ["fp32", "int4"]
    assert {"jiwer", "faster-whisper"} <= set(document["machine"]["versions"])


def test_what_a_draft_network_guesses(run: Callable[..., Result], whisper: Path, tmp_path: Path) -> None:
    model, _ = open_whisper(whisper)
    save_draft(convert_whisper(model, range(4), text_encoder_layers=0, kvspn_ffn_dim=64), tmp_path / "draft")
    texts = {}
    for more in ((), ("--draft", tmp_path / "draft")):
        result = run("--split", "eval", "--weights", "fp32,int8", "--json", tmp_path / "out.json", *more)
        assert result.exit_code == 0, result.output
        assert ("tokens/step, k = 1" in result.stdout) == bool(more)
        document = json.loads((tmp_path / "out.json").read_text())
        texts[more] = [system["languages"] for system in document["systems"]]
    assert len({json.dumps(each) for each in texts.values()}) == 1
    assert list(document["drafting"]) == ["fp32", "int8"]
    for found in document["drafting"].values():
        assert list(found) == ["en", "zh", "all"]
        assert found["all"]["drafted"] == found["en"]["drafted"] + found["zh"]["drafted"] > 0


def test_translations_are_judged_by_bleu(run: Callable[..., Result]) -> None:
    result = run("--split", "train", "--task", "translate", "--language", "de", "--limit", 1)
    assert result.exit_code == 0 and "de, BLEU" in result.stdout and "as transformers" not in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object, got [1]"),
        ({**ENTRY, "path": None}, "path must be a text, got null"),
        ({**ENTRY, "language": 3}, "language must be a text, got 3"),
        ({**ENTRY, "text": None}, "text must be a text, got null"),
        ({**ENTRY, "text": "?!"}, "text must have words, got '?!'"),
        ({**ENTRY, "translation": 1}, "translation must be a text, got 1"),
        ({**ENTRY, "language": "xx"}, "unknown language 'xx'"),
        ({**ENTRY, "path": "eval/none.wav"}, "none.wav: no such file"),
        ({**ENTRY, "path": "eval/noise.txt"}, "noise.txt: not a readable audio file"),
        ({**ENTRY, "path": "eval/long.wav"}, "at most 2 seconds long, the model's window, got 3.0"),
    ],
)
def test_a_bad_line_is_named(line: Any, message: str, run: Callable[..., Result], speech: Path) -> None:
    manifest = speech / "bad.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    manifest.write_text(json.dumps(ENTRY) + "\n" + text, "utf-8")
    refused(run(manifest=manifest), "--speech", "bad.jsonl, line 2: ", message)


def test_other_bad_input(run: Callable[..., Result], speech: Path, tmp_path: Path, monkeypatch) -> None:
    refused(run(manifest=tmp_path / "no.jsonl"), "--speech", "no.jsonl: No such file")
    refused(run(manifest=speech / "eval/en.wav"), "--speech", "en.wav: not a text file")
    refused(run("--split", "test"), "--speech", "no clips of split 'test'")
    refused(run("--language", "it"), "--speech", "no clips of language 'it'")
    refused(run("--task", "translate"), "line 1: translation must be a text to judge translations, got none")
    refused(run("--k", 1), "--k must be left out with --speech")
    refused(run("--weights", "fp32,fp1"), "--weights must be", "fp1")
    refused(run("--peers", model=save_model(tmp_path)), "--peers must be left out for a whisperM2M")
    without = CliRunner().invoke(app, ["evaluate", "--split", "eval"])
    refused(without, "--split needs --speech")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    refused(run(), "--speech needs jiwer: pip install 'kvspn[evaluate]'")


def test_splits_and_languages(speech: Path) -> None:
    def names(*wanted: Any) -> list[str]:
        return [clip.name for clip in read_recordings(speech / "manifest.jsonl", *wanted)]

    assert names("train") == ["train-de.wav"]
    assert names("eval", ["zh"]) == ["eval/1-zh.wav", "eval/3-zh.wav"]
    assert len(names()) == 5


def test_error_rates_by_hand() -> None:
    """Case, punctuation and spelled-out forms are no errors; words count, in Chinese characters."""

    def clip(name: str, language: str, text: str) -> Recording:
        return Recording("", name, Path(), language, text, None)

    clips = [
        clip("a", "en", "Mr. Smith won't pay"),  # mister smith will not pay
        clip("b", "en", "He said: one, two!"),  # he said 12
        clip("c", "zh", "你好，世界"),
        clip("d", "de", "Der Bahnhof"),
    ]
    heard = ["mister smith will not", "he said one two extra", "你 好世", "der bahnhof."]
    outputs = [{"kvspn fp32": [i]} for i in range(4)]
    (system,) = judge(clips, outputs, lambda tokens: heard[tokens[0]], "transcribe", None)
    assert {name: (score.measure, score.units) for name, score in system.languages.items()} == {
        "de": ("WER", 2),
        "en": ("WER", 8),
        "zh": ("CER", 4),
    }
    assert [score.value for score in system.languages.values()] == [0, 25, 25]  # 1 lost + 1 added; 1 lost
    assert system.mean == round(50 / 3, 2)
    assert all(score.identical is None for score in system.languages.values())


def test_a_clip_is_encoded_once_for_all_formats(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = Translator.from_folder(whisper)
    encoded = []
    encode = translator.model.encode

    def counted(features: torch.Tensor) -> torch.Tensor:
        encoded.append(features.shape)
        return encode(features)

    monkeypatch.setattr(translator.model, "encode", counted)
    found = Formats(translator, ["fp32", "bf16", "int8"], "transcribe")(sound(1.0), "de")
    assert list(found) == ["fp32", "bf16", "int8"] and len(encoded) == 1
    end = translator.model.config.eos_token_id
    assert found["fp32"] and all(token < end for tokens in found.values() for token in tokens)


def test_the_margin_is_that_of_the_first_token_that_differs(whisper: Path) -> None:
    model, processor = open_model(whisper, torch.float32)
    greedy = Greedy(as_whisper(model), processor, "transcribe")
    samples = sound(1.0)
    own = greedy(samples, "de")
    other = [*own[:2], (own[2] + 1) % 200, 7]
    said = model.generation_config
    start = model.config.decoder_start_token_id
    ids = [start, said.lang_to_id["<|de|>"], said.task_to_id["transcribe"], said.no_timestamps_token_id]
    features = processor(samples, sampling_rate=16_000).input_features
    with torch.no_grad():
        logits = model(features, decoder_input_ids=torch.tensor([[*ids, *own[:2]]])).logits[0, -1]
    expected = float(logits[own[2]] - logits[other[2]])
    found = greedy.margins(samples, "de", own, [other, own[:-1]])  # the second ends sooner
    assert found[0] == pytest.approx(expected, abs=1e-5) and np.isfinite(found[1])
