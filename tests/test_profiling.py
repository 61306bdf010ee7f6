"""`kvspn profile`: figures that are complete and correct, and a page that a browser shows."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvspn.cli import app
from kvspn.engines import backends
from kvspn.measure import profile
from kvspn.measure.shapes import SHAPES, start
from kvspn.measure.steps import step_bytes
from kvspn.weights.formats import quantise
from support.pages import Page, assert_shown

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


def test_speedup():
    assert profile.speedup(0.35, 0.85) == pytest.approx(1.37, abs=0.01)  # the paper's own figures
    assert profile.speedup(0.4, 0.4) == 1


@pytest.mark.parametrize("name", profile.VARIANTS)
def test_variants_are_told_from_wrong_ones(name, monkeypatch):
    q, keys = torch.randn(1, 2, 1, 8), profile.Keys.of(torch.randn(3, 2, 1, 2, 97, 8))
    length = 90
    assert profile._correct(name, q, keys, length)
    monkeypatch.setitem(
        profile.VARIANTS, name, lambda q, keys, length: profile.flattened(q, keys, length - 2)
    )
    assert not profile._correct(name, q, keys, length)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    options = ["--shape", "miniature", "--lengths", "3,90", "--rounds", "1"]
    files = {"json": "p.json", "html": "p.html", "trace": "t.json"}
    options += [part for option, name in files.items() for part in (f"--{option}", str(folder / name))]
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, ["profile", *options])
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_figures(written):
    folder, printed = written
    document = json.loads((folder / "p.json").read_text())
    short, long = document["points"]
    assert (short["length"], long["length"]) == (3, 90)
    for point in document["points"]:
        assert point["correct"]
        assert set(point["attention"]) == set(point["attention_bytes"]) == set(profile.VARIANTS)
        assert min(point["step"], point["kvspn_step"], *point["attention"].values()) > 0
    # bf16: layers x K and V x heads x T x width x 2 bytes
    assert long["kv_bytes"] == 4 * 2 * 3 * 90 * 64 * 2
    assert long["attention_bytes"]["flattened"] == 2 * long["attention_bytes"]["last layer"]
    assert long["attention_bytes"]["int8"] == 2 * 2 * 3 * 90 * (64 + 4)
    for name in ("strided", "pooled"):  # 24 older positions
        assert long["attention_bytes"][name] == 2 * 2 * 3 * (24 // 4 + 66) * 64 * 2
    assert {check["k"] for check in document["checks"]} == {"1", "inf"}
    assert all(check["acceptance"] == 1 for check in document["checks"] if check["k"] == "inf")
    assert "breaks even at" in printed


def test_stages_of_faults_in_the_step(written):
    """A native step is no one block: each stage has its time, its bytes and its share of a bare read."""
    document = json.loads((written[0] / "p.json").read_text())
    plain, drafted = (
        {stage["name"]: stage for stage in document["stages"] if stage["step"] == step}
        for step in ("plain", "KVSPN")
    )
    layer = [
        "self_qkv",
        "self_attention",
        "self_out",
        "cross_q",
        "cross_attention",
        "cross_out",
        "fc1",
        "fc2",
    ]
    assert list(plain) == ["embed", *layer, "head", "accept"]
    assert all(plain[name]["count"] == 4 for name in layer)
    draft = [name for name in drafted if name.startswith("draft.")]
    assert set(drafted) == {*plain, *draft} and drafted["draft.fc1"]["count"] == 2
    shape = SHAPES["miniature"]
    weights = quantise(shape.weights(), "bf16")
    for stages, drafts in ((plain, False), (drafted, True)):
        read = sum(stage["bytes"] for stage in stages.values())
        assert read == pytest.approx(step_bytes(weights, replace(shape, length=3), 1, drafts), rel=0.01)
        for stage in stages.values():
            assert stage["ms"] >= 0 and (stage["percent_of_read"] is None) == (not stage["bytes"])
    # The matrices of bf16 and their fp32 biases.
    assert plain["fc1"]["bytes"] == 4 * (192 * 768 * 2 + 768 * 4)
    assert all(f"{name} " in written[1] for name in (*layer, "draft.kv_attention"))


def test_a_profiled_step_is_a_step():
    shape = SHAPES["miniature"]
    engines = [start("native", quantise(shape.weights(), "int8"), shape) for _ in range(2)]
    for draft in (False, True, True):
        engines[0].step(1, draft)
        stages = engines[1].profile(1, draft)
        assert all(name and nanoseconds >= 0 and size >= 0 for name, nanoseconds, size in stages)
    assert torch.equal(engines[0].tokens, engines[1].tokens)
    assert torch.equal(engines[0].stats, engines[1].stats)
    with pytest.raises(ValueError, match="k must be at least 1"):
        engines[1].profile(0)


def test_page(written):
    """The record's figures, four plots, nothing from elsewhere."""
    document = json.loads((written[0] / "p.json").read_text())
    page = Page(written[0] / "p.html")
    assert page.plots == 4
    cost, stages, acceptance, checks = page.tables
    assert [cells[0] for cells in stages[1:]] == [stage["name"] for stage in document["stages"]]
    for cells, point in zip(cost[1:], document["points"], strict=True):
        assert cells[:3] == [str(point["length"]), f"{point['step']:.2f}", f"{point['kvspn_step']:.2f}"]
        assert cells[5:] == [f"{ms:.3f}" for ms in point["attention"].values()]
    assert dict(zip(*acceptance, strict=True))["strided"] == "not measured"
    assert len(checks) == 1 + len(document["checks"])


def test_page_in_a_browser(written):
    assert_shown(written[0] / "p.html", 4, ["flattened", "not measured"])


def test_acceptance_is_that_of_the_record(monkeypatch):
    records = {"": {"acceptance": 0.4}, "int8-kv": {"acceptance": 0.3}}
    monkeypatch.setattr(profile, "miniature", records.get)
    known = {"flattened": 0.4, "concatenated": 0.4, "merged": 0.4, "int8": 0.3}
    assert profile.acceptance() == dict.fromkeys(profile.VARIANTS) | known
    monkeypatch.setattr(profile, "miniature", lambda variant: None)
    assert set(profile.acceptance().values()) == {None}


def test_trace(written):
    """Ranges of both backends' steps, and the reference's ops inside its own."""
    events = json.loads((written[0] / "t.json").read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    steps = {event["name"]: event for event in ranges if event["name"].endswith("step")}
    kinds = [f"{name}: {kind} step" for name in ("native", "reference") for kind in ("plain", "KVSPN")]
    assert list(steps) == kinds
    ops = [event for event in ranges if event["name"] not in steps]
    plain, drafted = (
        [op["name"] for op in ops if step["ts"] <= op["ts"] <= step["ts"] + step["dur"]]
        for step in (steps[kind] for kind in kinds[2:])
    )
    # The miniature: four layers of three attentions' worth of ops, and two draft blocks.
    assert plain.count("append_kv") == drafted.count("append_kv") == 4
    assert (plain.count("flat_kv_attention"), drafted.count("flat_kv_attention")) == (8, 12)
    assert (plain.count("lm_head_verify"), drafted.count("lm_head_verify")) == (1, 2)
    assert len(plain) + len(drafted) == len(ops)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "whole numbers from 1"),
        (["--lengths", "8,x"], "got 'x'"),
        (["--shape", "huge"], "whisperM2M, miniature"),
        (["--weights", "int3"], "weights must be one of"),
        (["--json", "/nowhere/p.json"], "no such folder"),
        (["--trace", "/nowhere/t.json"], "no such folder"),
    ],
)
def test_bad_options(arguments, message):
    result = CliRunner().invoke(app, ["profile", "--shape", "miniature", "--lengths", "8", *arguments])
    assert result.exit_code
    assert message in " ".join(result.stderr.split())
