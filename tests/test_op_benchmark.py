"""The ops in the benchmark: right ones pass, wrong ones are found out, one's own stand beside them."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvspn.measure import launches, timing
from kvspn.measure.ops import CALLS, OPS, WEIGHTED, Sizes, run
from kvspn.measure.shapes import Shape
from kvspn.weights.formats import FORMATS

TINY = Shape(4, 2, heads=2, ffn=96, vocabulary=97, encoder_positions=20, length=6, head_dim=32)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_buffer", lambda device: torch.ones(1 << 18))


def reference(call: str):
    return import_module(f"kvspn.ops.{call.partition('/')[0]}").reference


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("call", CALLS)
def test_the_reference_is_right_and_a_wrong_one_is_not(call: str, fmt: str, batch: int) -> None:
    made = CALLS[call](Sizes(TINY, fmt, batch, "cpu"))
    right = reference(call)
    for _ in range(2):  # in place, too
        made.reset()
        assert made.correct(made.run(right))
    assert made.bytes > 0 and made.flops >= 0

    def wrong(*args, **kwargs):
        """A percent off, or the last of the tensors in place."""
        out = right(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 1.05
        if out is not None:
            return (out[0] + 1) % 97, out[1]
        args[0].view(-1)[-1:].add_(1)
        if call.startswith("accept"):
            args[1].add_(1)
        return None

    made.reset()
    assert not made.correct(made.run(wrong))


def test_nan_is_wrong() -> None:
    made = CALLS["flat_kv_attention/self"](Sizes(TINY, "fp32", 1, "cpu"))
    assert not made.correct(made.run(reference("flat_kv_attention/self")) * torch.nan)


def test_rows() -> None:
    twice = lambda *args, **kwargs: 2 * reference("fused_linear/")(*args, **kwargs)  # noqa: E731
    found = run(
        {"mine": SimpleNamespace(fused_linear=twice)},
        shapes={"tiny": TINY},
        formats=["fp32", "int8"],
        batches=[1, 2],
        lengths=[6, 9],
        rounds=2,
    )
    assert set(found) == {"machine", "warnings", "ops"}
    assert set(found["machine"]["devices"]["cpu"]["product_gflop_per_s"]) == {"fp32", "bf16"}
    rows = found["ops"]
    assert all(row.correct == (row.backend != "mine") for row in rows)
    assert {row.what for row in rows if row.backend == "mine"} == {
        f"fused_linear/{x}" for x in ("qkv", "fc1", "fc2")
    }
    assert {row.what.partition("/")[0] for row in rows if row.weights == "int8"} == set(WEIGHTED)
    assert {row.what.partition("/")[0] for row in rows} == set(OPS)
    keys = [(row.what, row.backend, row.weights, row.batch, row.kv_length) for row in rows]
    assert len(keys) == len(set(keys))
    assert {row.kv_length for row in rows if row.what.endswith("/cross-model")} == {6, 9}
    for row in rows:
        assert len(row.ms) == len(row.read_ms) == 2 and row.ms_min <= row.ms_median <= row.ms_max
        assert (row.device, row.cache, row.launches, row.host_synchronisations) == ("cpu", "warm", 1, None)


def test_work_grows_with_the_batch() -> None:
    one, four = (CALLS["fused_linear/fc1"](Sizes(TINY, "fp32", batch, "cpu")) for batch in (1, 4))
    assert one.flops == 2 * 2 * 96 * 64 and four.flops == 4 * one.flops
    # The matrix is read once: x and the result alone grow.
    assert four.bytes - one.bytes == 3 * 2 * (96 + 64) * 4
    cross = CALLS["flat_kv_attention/cross-model"](Sizes(TINY, "bf16", 1, "cpu"))
    assert cross.flops == 4 * 2 * 32 * 2 * 6  # two products of heads x D over layers x T
    assert cross.bytes == 2 * (2 * 2 * 2 * 6 * 32 + 2 * 2 * 32)


def test_cold_caches_are_emptied_before_each_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        timing, "_buffer", lambda device: SimpleNamespace(sum=lambda: order.append("emptied"))
    )
    timing.clock(lambda: order.append("call"), lambda: order.append("reset"), cold=True)()
    assert order == ["reset", "call", "reset", "emptied", "call"]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"ops must be of flat_kv_attention, .*, got 'softmax'"):
        run(ops=["softmax"], shapes={"tiny": TINY})
    with pytest.raises(ValueError, match="must not be called reference"):
        run({"reference": SimpleNamespace()}, shapes={"tiny": TINY})


@pytest.mark.gpu
def test_launches_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    assert launches.count(lambda: values.add_(1)) == {"launches": 1, "kernels": 1, "host_synchronisations": 0}
    assert launches.count(lambda: values.sum().item())["host_synchronisations"] == 1


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "own.html"
    monkeypatch.setattr(sys, "argv", ["own_kernel.py", "--rounds", "4", "--html", str(page)])
    runpy.run_path(str(Path(__file__).parents[1] / "examples/own_kernel.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if " FLOP/byte " in line]
    assert sum(" sdpa " in line for line in rows) == 6  # three uses, two dtypes
    assert "WRONG" not in printed and all(line.endswith("correct") for line in rows)
    assert printed.count("times as long as reference") == 6
    assert "sdpa" in page.read_text("utf-8")
