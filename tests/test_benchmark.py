"""The benchmark: its rows, its ratios, what it skips, and that a wrong peer is found out. No times."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from kvspn.engines import default_backend
from kvspn.measure import allocations, peers, steps, timing
from kvspn.measure.peers import PEERS, Problem, Skipped
from kvspn.measure.shapes import Shape
from kvspn.measure.steps import speedups
from support.rows import STEP

TINY = Shape(2, 1, heads=2, ffn=128, vocabulary=97, encoder_positions=20, length=6)
SHAPES = {"tiny": TINY}
BACKEND = default_backend(torch.device("cpu"))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "UNPRUNED", {"tiny": ("whisper-tiny", replace(TINY, layers=4))})
    monkeypatch.setattr(timing, "_buffer", lambda device: torch.ones(1 << 18))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(TINY.weights(), TINY.length, TINY.encoder_positions)


def stub(logits):
    """A peer in fp32 whose step of 1 ms makes logits(problem, rows)."""
    return SimpleNamespace(
        FORMATS={"fp32": 4},
        ROWS=(1, 2),
        LAUNCHES=1,
        prepare=lambda problem, fmt: lambda rows: (1.0, logits(problem, rows)),
    )


def test_every_field_is_filled(shapes: None) -> None:
    found = steps.run(SHAPES, [BACKEND], ["fp32", "int8", "int8/int4"], rounds=2)
    document = json.loads(json.dumps({**found, "rows": [asdict(row) for row in found["rows"]]}))
    assert set(document) == {"machine", "warnings", "rows", "summary", "draft"}
    machine = document["machine"]
    assert machine["read_gb_per_s"] > 0 and machine["memory_gib"] > 0
    assert machine["cpu"]["cores"] >= 1 and machine["versions"]["torch"] and machine["date"]
    kinds = (("step", 1), ("step", 2), ("kvspn_step", 2), ("draft", 1), ("token", 2))
    assert [(row["weights"], row["what"], row["rows"]) for row in document["rows"]] == [
        (fmt, *kind) for fmt in ("fp32", "int8", "int8/int4") for kind in kinds
    ]
    for row in document["rows"]:
        assert (row["shape"], row["backend"], row["batch"], row["kv_length"]) == ("tiny", BACKEND, 1, 6)
        assert row["correct"] is True and row["launches"] == 1 and row["bytes"] > 0
        assert row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["ms_interval"] is None  # two rounds are too few
        shown = row["gb_per_s"], row["percent_of_measured_peak"], row["gflop_per_s"]
        assert (None in shown) == ("no interval" in row["notes"]) == (row["what"] in ("draft", "token"))
    step, _, whole, draft, token = document["rows"][:5]
    summary = document["summary"]
    assert step["bytes"] + draft["bytes"] == whole["bytes"]
    reached = steps.miniature()["tokens_per_step"]
    assert summary["tokens_per_step"][f"tiny/{BACKEND}/fp32"] == reached
    assert token["ms_median"] == pytest.approx(whole["ms_median"] / reached, abs=1e-4)
    for ratio in ("two_row_cost", "draft_overhead", "tokens_per_step"):
        assert set(summary[ratio]) == {f"tiny/{BACKEND}/{fmt}" for fmt in ("fp32", "int8", "int8/int4")}
    assert summary["speedup"] == {}


def test_a_cheaper_draft(shapes: None) -> None:
    """The weights of the head and the encoder's positions that it no longer reads, to the byte."""
    full, cheap = (
        steps.run(
            {"tiny": replace(TINY, short_list=words, encoder_stride=stride)}, [BACKEND], ["fp32"], rounds=1
        )
        for words, stride in ((0, 1), (40, 3))
    )
    assert cheap["draft"] == {"vocabulary": 40, "encoder_stride": 3}
    before, after = (next(row for row in found["rows"] if row.what == "draft") for found in (full, cheap))
    assert before.correct and after.correct
    assert before.bytes - after.bytes == 4 * TINY.width * ((97 - 40) + 2 * (20 - 7))


def test_batches_and_lengths(shapes: None) -> None:
    found = steps.run(SHAPES, [BACKEND], ["fp32"], rounds=2, batches=[1, 3], lengths=[6, 9], cold=True)
    rows = [row for row in found["rows"] if row.what == "kvspn_step"]
    assert [(row.batch, row.kv_length) for row in rows] == [(1, 6), (1, 9), (3, 6), (3, 9)]
    assert all(row.correct and row.cache == "cold" and len(row.ms) == len(row.read_ms) == 2 for row in rows)
    name = f"tiny/{BACKEND}/fp32"
    keys = {name, f"{name}/T 9", f"{name}/batch 3", f"{name}/batch 3/T 9"}
    assert set(found["summary"]["two_row_cost"]) == keys
    one, longer, three, _ = rows
    assert three.flops == 3 * one.flops
    # The base model's two rows and the draft's one over three more positions: K and V, two layers, two heads.
    assert longer.flops - one.flops == (2 + 1) * 2 * 2 * 2 * 3 * 128
    assert longer.bytes - one.bytes == (1 + 1) * 2 * 2 * 3 * 128 * 4
    assert three.bytes < 3 * one.bytes  # weights are read once


def test_bad_input(shapes: None) -> None:
    with pytest.raises(ValueError, match="lengths must be from 1 to 440 for tiny, got 441"):
        steps.run(SHAPES, [BACKEND], ["fp32"], lengths=[441])
    with pytest.raises(ValueError, match="cold must be False with peers"):
        steps.run(SHAPES, [BACKEND], ["fp32"], peers=["openvino"], cold=True)


def test_int8_caches(shapes: None) -> None:
    found = steps.run(SHAPES, [BACKEND], ["fp32"], rounds=1, kv=["int8"])
    assert all(row.correct for row in found["rows"])
    assert set(found["summary"]["two_row_cost"]) == {f"tiny/{BACKEND}/fp32", f"tiny/{BACKEND}/fp32/int8 KV"}
    rows = [row for row in found["rows"] if row.kv == "int8"]
    assert 2 * len(rows) == len(found["rows"])
    weights = TINY.weights()
    usual, int8, none = (
        steps.step_bytes(weights, shape, 1, False, kv)
        for shape, kv in ((TINY, None), (TINY, "int8"), (replace(TINY, length=0, encoder_positions=0), None))
    )
    assert rows[0].bytes == int8
    assert (int8 - none) * 4 == pytest.approx((usual - none) * (1 + 4 / TINY.head_dim))


def test_two_rows_cost_no_more_than_the_whole_step_reads() -> None:
    weights = TINY.weights()
    faint = steps.faint_draft(weights)
    assert faint.layers is weights.layers
    assert sum(len(t.flatten()) for t in (faint.blocks[0].fc1.weight, faint.draft_head.weight)) == 17 * 128


def test_peers_beside_it(shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = stub(lambda problem, rows: problem.logits[:rows])
    monkeypatch.setattr(steps, "load", lambda name: right)
    found = steps.run(
        SHAPES,
        [BACKEND],
        ["fp32"],
        rounds=1,
        peers=["transformers", "openvino"],
        batches=[1, 2],
        lengths=[9, 6],
    )
    theirs = [row for row in found["rows"] if row.backend in PEERS]
    assert [(row.shape, row.backend, row.rows) for row in theirs] == [
        *(("tiny", peer, rows) for peer in ("transformers", "openvino") for rows in (1, 2)),
        ("whisper-tiny", "transformers", 1),
        ("whisper-tiny", "transformers", 2),
    ]
    assert all(row.correct and row.ms_median == 1 and row.allocations is None for row in theirs)
    own = next(row for row in found["rows"] if (row.backend, row.what) == (BACKEND, "step"))
    assert theirs[0].bytes == own.bytes
    assert {(row.batch, row.kv_length) for row in theirs} == {(1, 9)}  # where they are compared with ours
    assert set(found["summary"]["speedup"]) == {f"tiny/{BACKEND}/fp32/T 9"}
    ratios = found["summary"]["speedup"][f"tiny/{BACKEND}/fp32/T 9"]
    assert set(ratios) == {"step_1", "step_2", "token"}
    assert all("over_whisper_medium_fp32" in ratio for ratio in ratios.values())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda problem, rows: problem.logits[:rows].flip(1),
        lambda problem, rows: problem.logits[:rows] * 1.01,
        lambda problem, rows: problem.logits[:rows] * torch.nan,
        lambda problem, rows: problem.logits[1:].expand(rows, -1),
    ],
    ids=["other tokens", "a percent off", "nan", "another row's"],
)
def test_a_wrong_peer_is_found_out(shapes: None, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    monkeypatch.setattr(steps, "load", lambda name: stub(wrong))
    found = steps.run(SHAPES, [BACKEND], ["fp32"], rounds=1, peers=["openvino"])
    assert not next(row for row in found["rows"] if row.backend == "openvino").correct
    assert "step_1" not in found["summary"]["speedup"]


def test_a_missing_peer_is_skipped_with_a_line(shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ctranslate2", "onnx"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("ctranslate2", "openvino", "onnxruntime", "graph"):
        monkeypatch.delitem(sys.modules, f"kvspn.measure.peers.{name}", raising=False)
    lines: list[str] = []
    missing = ("ctranslate2", "openvino", "onnxruntime")
    found = steps.run(SHAPES, [BACKEND], ["fp32"], rounds=1, peers=missing, skipped=lines.append)
    assert [line.split(":")[0] for line in lines] == list(missing)
    assert all(f"pip install {line.partition(':')[0]}" in line for line in lines)
    assert {row.backend for row in found["rows"]} == {BACKEND}


@pytest.mark.filterwarnings("ignore:.*quant")  # torch's, that its eager quantisation will go
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_the_same_step(problem: Problem, name: str, fmt: str, set_threads) -> None:
    set_threads(2)
    try:
        peer = peers.load(name)
    except Skipped as reason:
        pytest.skip(str(reason))
    if fmt not in peer.FORMATS:
        pytest.skip(f"{name} has no {fmt}")
    step = peer.prepare(problem, fmt)
    for rows in (*peer.ROWS, *peer.ROWS):  # a step leaves nothing behind
        milliseconds, logits = step(rows)
        assert milliseconds > 0 and logits.shape == (rows, TINY.vocabulary)
        assert problem.correct(logits, fmt)


def test_transformers_with_a_static_cache_takes_the_same_step(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is traced in one graph; a GPU's bench compiles it."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, **options: compile(model, backend="eager", **options)
    )
    runner = peers.load("transformers").static(problem, "fp32")
    for rows in (1, 2, 1):
        _, logits = peers.timed(*runner(rows))
        assert problem.correct(logits, "fp32")


def test_speedups_are_over_the_fastest_correct_peer_of_the_same_width() -> None:
    ours = replace(STEP, weights="int8", kv_length=6)
    rows = [
        ours,
        replace(ours, weights="int8/int4", what="token", rows=2, ms_median=4.0),
        replace(ours, backend="openvino", ms_median=5.0),
        replace(ours, backend="onnxruntime", ms_median=6.0),
        replace(ours, backend="ctranslate2", ms_median=1.0, correct=False),
        replace(ours, backend="openvino", weights="int4", ms_median=1.0),
        replace(ours, backend="openvino", rows=2, ms_median=1.0),
        replace(ours, backend="openvino", batch=2, ms_median=1.0),
        replace(ours, batch=2, ms_median=1.0),
        replace(ours, backend="transformers", weights="fp32", ms_median=20.0),
    ]
    compared = {"fastest_peer": "openvino", "over_fastest_peer": 2.5, "over_transformers_fp32": 10.0}
    token = {"fastest_peer": "openvino", "over_fastest_peer": 1.25, "over_transformers_fp32": 5.0}
    found = speedups(rows, {"tiny": replace(TINY, length=6)})
    for compared_to in found.values():
        for ratios in compared_to.values():
            for name in [name for name in ratios if name.endswith("_interval")]:
                assert ratios.pop(name) is None  # three rounds are too few
    assert found == {
        "tiny/native/int8": {"step_1": compared},
        "tiny/native/int8/int4": {"token": token},
        "tiny/native/int8/batch 2": {
            "step_1": {"fastest_peer": "openvino", "over_fastest_peer": 1.0},
        },
    }


def test_allocations_are_counted_where_glibc_can() -> None:
    counts = allocations.count(2, 1, "reference", "fp32")
    if platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64":
        assert counts == (None, None)
    else:
        assert all(count > 100 for count in counts)  # every op of torch makes its tensor


def test_allocations_are_none_without_a_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocations, "_TRACER", "no_such_library.so")
    assert allocations.count(2, 1, "reference", "fp32") == (None, None)
