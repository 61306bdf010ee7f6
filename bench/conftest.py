"""Benchmarks of the ops and of the decoder step, each with a correctness check beside it.

    pytest bench --benchmark-only --shape whisperM2M --dtype bfloat16 --benchmark-json out/bench.json

Without --benchmark-only, or under xdist, they are tests. The time in the table is what a caller waits: on a
GPU with launches and one synchronisation, caches warm. Records of a GPU hold beside it, in extra_info, the
time by CUDA events with a cold L2 and the launches already queued (device_ms), and what one call launches and
runs (bench/device.py). What was skipped or failed is in the record as well, under left_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch

from bench.device import on_device
from bench.machine import machine
from kvspn.measure import shapes
from kvspn.measure.shapes import Shape
from kvspn.measure.timing import synchronise

T = TypeVar("T")


SHAPES = {
    "small": Shape(6, 3, 6, 768, 4096, 200, 32, head_dim=32),
    "whisperM2M": shapes.SHAPES["whisperM2M"],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", choices=SHAPES, default="small", help="decoder shape of the benches")
    parser.addoption("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.addoption("--int8", action="store_true", help="int8 matrices in the decoder step")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    machine_info["kvspn"] = {device: machine(device) for device in devices}


_left_out: list[dict[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        return
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
    else:
        errors = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
        reason = f"failed: {errors[0] if errors else report.when}"
    _left_out.append({"name": report.nodeid.rpartition("::")[2], "reason": reason})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["left_out"] = _left_out


@contextmanager
def foreign(device: str) -> Iterator[None]:
    """Another package's code: what it raises on a GPU is a line in the record, and the rest goes on."""
    try:
        yield
    except Exception as error:
        if device == "cpu":
            raise
        pytest.skip(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.config.getoption("--shape")]


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest, device: str) -> Callable[..., Any]:
    """timed(call, nbytes, reset, case): time ``call``, each round after ``reset``; returns its last result.

    nbytes: what the call must at least read and write; the record holds it and the GB/s that follow.
    case: the heading of its table, if not the test's name.
    """

    def run(
        call: Callable[[], T], nbytes: int, reset: Callable[[], object] = lambda: None, case: str = ""
    ) -> T:
        def setup() -> None:
            reset()
            synchronise(device)

        def target() -> T:
            result = call()
            synchronise(device)
            return result

        what = case or request.node.originalname.removeprefix("test_")
        benchmark.group = f"{what} on {device}"
        benchmark.extra_info |= {
            name: request.config.getoption(f"--{name}") for name in ("shape", "dtype", "int8")
        }
        result = benchmark.pedantic(target, setup=setup, rounds=20, warmup_rounds=2)
        if benchmark.stats:
            seconds = benchmark.stats.stats.median
            benchmark.extra_info |= {"device": device, "bytes": nbytes, "gb_per_s": nbytes / seconds / 1e9}
            if device == "cuda":
                benchmark.extra_info |= on_device(call, reset, seconds)
        return result

    return run
