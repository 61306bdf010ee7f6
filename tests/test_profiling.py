"""`kvspn profile`: figures that are complete and correct, and a page that a browser shows."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from kvspn import profiling
from kvspn.cli import app
from kvspn.engines import backends

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


def test_speedup():
    assert profiling.speedup(0.35, 0.85) == pytest.approx(1.37, abs=0.01)  # the paper's own figures
    assert profiling.speedup(0.4, 0.4) == 1


@pytest.mark.parametrize("name", profiling.VARIANTS)
def test_variants_are_told_from_wrong_ones(name, monkeypatch):
    q, kv = torch.randn(1, 2, 1, 8), torch.randn(3, 2, 1, 2, 21, 8)
    length = torch.tensor([18], dtype=torch.int32)
    assert profiling._correct(name, q, kv, length)
    monkeypatch.setitem(
        profiling.VARIANTS, name, lambda q, kv, length: profiling.flattened(q, kv, length - 2)
    )
    assert not profiling._correct(name, q, kv, length)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    options = ["--shape", "miniature", "--lengths", "3,70", "--rounds", "1"]
    files = ["--json", str(folder / "p.json"), "--html", str(folder / "p.html")]
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, ["profile", *options, *files])
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_figures(written):
    folder, printed = written
    document = json.loads((folder / "p.json").read_text())
    short, long = document["points"]
    assert (short["length"], long["length"]) == (3, 70)
    for point in document["points"]:
        assert point["correct"]
        assert set(point["attention"]) == set(point["attention_bytes"]) == set(profiling.VARIANTS)
        assert min(point["step"], point["kvspn_step"], *point["attention"].values()) > 0
    # bf16: layers x K and V x heads x T x width x 2 bytes
    assert long["kv_bytes"] == 4 * 2 * 3 * 70 * 64 * 2
    assert long["attention_bytes"]["flattened"] == 2 * long["attention_bytes"]["last layer"]
    assert long["attention_bytes"]["strided"] == 2 * 2 * 3 * 18 * 64 * 2
    assert {check["k"] for check in document["checks"]} == {"1", "inf"}
    assert all(check["acceptance"] == 1 for check in document["checks"] if check["k"] == "inf")
    assert "breaks even at" in printed


def test_page(written):
    """Four plots, nothing from elsewhere; in a browser, where one is, without an error."""
    page = (written[0] / "p.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"http", page.replace("xlink:href", ""))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = f"--user-data-dir={written[0] / 'browser'}"
    shown = subprocess.run(
        [browser, *flags, profile, "--dump-dom", (written[0] / "p.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.stdout.count("<svg") == 4
    assert "flattened" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "whole numbers from 1"),
        (["--lengths", "8,x"], "got 'x'"),
        (["--shape", "huge"], "whisperM2M, miniature"),
        (["--weights", "int3"], "weights must be one of"),
        (["--json", "/nowhere/p.json"], "no such folder"),
    ],
)
def test_bad_options(arguments, message):
    result = CliRunner().invoke(app, ["profile", "--shape", "miniature", "--lengths", "8", *arguments])
    assert result.exit_code
    assert message in " ".join(result.stderr.split())
