"""What made the benchmark lie: wrong output called right, another shape's figures, noise without a word."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvspn.cli import app
from kvspn.cli.common import print_table
from kvspn.engines import default_backend
from kvspn.measure import machine, steps, timing
from kvspn.measure.correctness import Expected
from kvspn.measure.intervals import halves_differ, of_median
from kvspn.measure.shapes import Shape, find_shapes, parse_shape, shape_of, start
from kvspn.measure.timing import Case
from kvspn.weights import DecoderWeights, Linear
from kvspn.weights.formats import quantise
from support.tiny import save_model

TINY = Shape(6, 3, heads=2, ffn=128, vocabulary=500, encoder_positions=20, length=6, head_dim=32)
BACKEND = default_backend(torch.device("cpu"))
FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int8/int4")


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_buffer", lambda device: torch.ones(1 << 18))


def zeroed(weights: DecoderWeights, layer: int) -> DecoderWeights:
    """What a layer adds is nothing; of the draft network's first block for -1."""

    def nothing(linear: Linear) -> Linear:
        zero = 0x88 if linear.weight.dtype == torch.uint8 else 0  # both nibbles of int4 stand for 0
        bias = None if linear.bias is None else torch.zeros_like(linear.bias)
        return linear._replace(weight=torch.full_like(linear.weight, zero), bias=bias)

    if layer < 0:
        block = weights.blocks[0]
        block = block._replace(kv_out=nothing(block.kv_out), fc2=nothing(block.fc2))
        return replace(weights, blocks=(block, *weights.blocks[1:]))
    parts = weights.layers[layer]
    parts = parts._replace(
        self_out=nothing(parts.self_out), cross_out=nothing(parts.cross_out), fc2=nothing(parts.fc2)
    )
    return replace(weights, layers=(*weights.layers[:layer], parts, *weights.layers[layer + 1 :]))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kv", [None, "int8"])
def test_zeroed_layers_are_wrong_in_every_format(fmt: str, kv: str | None) -> None:
    """In the engine, where the stored weights were right, and in the stored weights."""
    made = TINY.weights()
    stored = quantise(made, fmt)
    expected = Expected(made, stored, fmt, TINY, kv)
    assert expected.of(start(BACKEND, stored, TINY, kv=kv))
    for layer in (-1, 0, 3, 5):
        wrong = zeroed(stored, layer)
        assert not expected.of(start(BACKEND, wrong, TINY, kv=kv)), layer
        assert not Expected(made, wrong, fmt, TINY, kv).of(start(BACKEND, wrong, TINY, kv=kv)), layer


def test_zeroed_layers_show_in_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        steps, "start", lambda backend, weights, *args: start(backend, zeroed(weights, 3), *args)
    )
    rows = steps.run({"tiny": TINY}, [BACKEND], ["bf16", "int8"], rounds=1)["rows"]
    assert not any(row.correct for row in rows)


def test_a_draft_of_few_words_is_right() -> None:
    shape = replace(TINY, short_list=90, encoder_stride=3)
    made = shape.weights()
    assert Expected(made, made, "fp32", shape, None).of(start(BACKEND, made, shape))


def test_own_shapes() -> None:
    shape = parse_shape("d=1280, layers=4,heads=20,vocab=51866")
    assert (shape.width, shape.layers, shape.groups, shape.ffn, shape.vocabulary) == (1280, 4, 2, 5120, 51866)
    assert list(find_shapes("miniature,whisperM2M")) == ["miniature", "whisperM2M"]
    for text, message in {
        "layers=4": "shape must say d",
        "d=10,layers=4,width=3": "got 'width=3'",
        "d=128,layers=x": "got 'layers=x'",
        "d=100,layers=4,heads=3": "heads that divide d=100; got 3",
        "d=128,layers=4,T=441": "T up to positions - 8=440; got 441",
        "huge": "whisperM2M, miniature",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_shapes(text)


def test_own_shape_and_whose_tokens_per_step() -> None:
    shape = {"mine": replace(TINY, layers=3, groups=1)}
    found = [steps.run(shape, [BACKEND], ["fp32"], rounds=1, tokens_per_step=given) for given in (None, 1.25)]
    for document, whose in zip(found, ("miniature", "given"), strict=True):
        *others, token = document["rows"]
        assert (token.what, token.tokens_per_step_of) == ("token", whose)
        assert all(row.tokens_per_step is None for row in others)
    whole, token = found[1]["rows"][2], found[1]["rows"][-1]
    assert token.ms_median == pytest.approx(whole.ms_median / 1.25, abs=1e-5)


def test_bench_of_a_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "mine")
    options = ["--weights", "fp32", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["bench", "--model", str(folder), *options])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["shape"] for row in rows} == {"mine"} and all(row["correct"] for row in rows)
    (reached,) = {row["tokens_per_step"] for row in rows} - {None}  # of the package's record
    assert f"token, the miniature's {reached:.2f} a step" in result.stdout
    refused = CliRunner().invoke(app, ["bench", "--model", str(folder), "--encoder-stride", "2"])
    assert "--encoder-stride is the model's own beside --model" in " ".join(refused.stderr.split())


def test_bench_of_a_model_without_draft_network(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", str(save_model(tmp_path / "mine", kvspn_blocks=0))])
    assert result.exit_code and "--model must have a draft network" in " ".join(result.stderr.split())


def test_a_shape_of_weights_needs_a_draft() -> None:
    made = TINY.weights()
    assert shape_of(made, 20) == replace(TINY, length=44)
    with pytest.raises(ValueError, match="weights must have draft blocks"):
        shape_of(replace(made, blocks=(), groups=0, draft_norm=None), 20)


@pytest.mark.parametrize("n", [5, 6, 9, 20, 41])
def test_interval_of_a_median(n: int) -> None:
    """As many of the values outside as 95% allows, not one more; none where there are too few."""
    found = of_median([float(i) for i in reversed(range(n))])
    if n < 6:
        assert found is None
        return
    assert found is not None and found[0] + found[1] == n - 1
    outside = int(found[0])
    missed = [2 * sum(comb(n, i) for i in range(count + 1)) / 2**n for count in (outside, outside + 1)]
    assert missed[0] <= 0.05 < missed[1]


def case(times: list[float], read: float, timed: bool = True) -> Case:
    return Case(
        what="step" if timed else "draft",
        shape="tiny",
        backend="native",
        weights="fp32",
        batch=1,
        rows=1,
        kv_length=6,
        bytes=10**6,
        flops=10**6,
        correct=True,
        launches=1,
        time=(lambda: 0.0) if timed else None,
        times=times,
        reads=[read] * len(times),
        products=[10.0] * len(times),
    )


def test_a_percentage_above_100_is_noted() -> None:
    below, above = (case([1 + i % 3 / 100 for i in range(20)], read).row() for read in (0.5, 2.0))
    assert below.notes == () and above.notes == ("above a read",)
    assert above.percent_of_measured_peak > 100 and above.peak_interval is not None
    assert all(note in timing.NOTES for note in above.notes)


def test_halves_that_differ_are_noted_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, jump = [1 + i % 3 / 100 for i in range(20)], [1 + i % 3 / 100 + (i > 9) for i in range(20)]
    assert not halves_differ(steady) and halves_differ(jump) and not halves_differ(jump[8:12])
    rows = [case(steady, 0.1).row(), case(jump, 0.1).row()]
    measured = {"cores_busy_elsewhere": 0.1, "cpu": {"cores": 4}}
    (halves,) = timing.warnings(rows, measured)
    assert "disagree in 1 of 2 rows" in halves
    busy, _ = timing.warnings(rows, measured | {"cores_busy_elsewhere": 1.0})
    assert "1.0 of the 4 cores busy" in busy


def test_a_draft_within_noise_is_no_figure() -> None:
    """A difference of two steps whose interval holds 0 is not shown, one that does not is."""
    noise = case([(-1) ** i * (1 + i / 10) for i in range(20)], 1.0, timed=False).row()
    assert noise.notes == ("no interval",)
    assert noise.gb_per_s is noise.percent_of_measured_peak is noise.gflop_per_s is None
    sure = case([1 + i % 3 / 10 for i in range(20)], 0.1, timed=False).row()
    assert sure.notes == () and sure.ms_interval is not None and sure.gb_per_s is not None


def test_others_on_the_machine_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.Elsewhere()
    if found.cores() is None:
        pytest.skip("the system does not say what its cores do")
    before = (10.0, 100.0, 50.0)  # seconds, busy, own
    monkeypatch.setattr(found, "_start", before)
    monkeypatch.setattr(found, "_now", lambda: (20.0, 125.0, 60.0))
    assert found.cores() == 1.5


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_keep_their_first_column(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """In 80 columns a table comes in parts, in a pipe whole; nothing is cut off."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no bold headings
    headings = [f"heading {i}" for i in range(12)]
    rows = [["flat_kv_attention/cross-model", *(f"{i}.{j}" for i in range(11))] for j in range(2)]
    print_table(headings, rows)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    parts = 3 if terminal else 1
    assert len(lines) == 3 * parts and (max(map(len, lines)) <= 80) == terminal
    assert sum(line.startswith(rows[0][0]) for line in lines) == 2 * parts
    cells = [cell for line in lines for cell in line.split()]
    assert all(cell in cells for row in rows for cell in row) and "…" not in stream.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "--shape must be of"),
        (["--weights", "int3"], "--weights must be one of"),
        (["--backend", "fpga"], "--backend must be of"),
        (["--draft-vocabulary", "1501"], "--draft-vocabulary must be from 1 to 1500"),
        (["--lengths", "441"], "--lengths must be"),
        (["--cold", "--peers"], "--cold must not be given with --peers"),
    ],
)
def test_errors_name_options(options: list[str], message: str) -> None:
    if options[0] != "--shape":
        options = ["--shape", "miniature", *options]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code and message in " ".join(result.stderr.split())
