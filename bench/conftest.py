"""Benchmarks of the ops and of the decoder step, each with a correctness check beside it.

    pytest bench --benchmark-only --shape whisperM2M --dtype bfloat16 --benchmark-json out/bench.json

Without --benchmark-only, or under xdist, they are tests. Caches are warm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from bench.machine import machine, synchronize
from kvspn import benchmark
from kvspn.benchmark import Shape

T = TypeVar("T")


SHAPES = {
    "small": Shape(6, 3, 6, 768, 4096, 200, 32, head_dim=32),
    "whisperM2M": benchmark.SHAPES["whisperM2M"],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", choices=SHAPES, default="small", help="decoder shape of the benches")
    parser.addoption("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.addoption("--int8", action="store_true", help="int8 matrices in the decoder step")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    machine_info["kvspn"] = {device: machine(device) for device in devices}


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
    """timed(call, nbytes, reset): time ``call``, each round after ``reset``; returns its last result.

    nbytes: what the call must at least read and write; the record holds it and the GB/s that follow.
    """

    def run(call: Callable[[], T], nbytes: int, reset: Callable[[], object] = lambda: None) -> T:
        def setup() -> None:
            reset()
            synchronize(device)

        def target() -> T:
            result = call()
            synchronize(device)
            return result

        benchmark.group = f"{request.node.originalname.removeprefix('test_')} on {device}"
        benchmark.extra_info |= {
            name: request.config.getoption(f"--{name}") for name in ("shape", "dtype", "int8")
        }
        result = benchmark.pedantic(target, setup=setup, rounds=20, warmup_rounds=2)
        if benchmark.stats:
            gb_per_s = nbytes / benchmark.stats.stats.median / 1e9
            benchmark.extra_info |= {"device": device, "bytes": nbytes, "gb_per_s": gb_per_s}
        return result

    return run
