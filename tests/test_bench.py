"""What bench/ makes of measurements: counts of launches, and the summary of a GPU's records. No times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.summary import page, summary, write_summary
from kvspn.measure.launches import tally

MACHINE = {
    "device": "A device",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2.11",
    "kvspn": "0",
    "date": "2026-01-01",
    "copy_gb_per_s": 2000.0,
}


def test_launches_are_the_hosts_and_kernels_the_devices() -> None:
    host = ["aten::mm", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync"]
    host += ["cudaDeviceSynchronize", "cudaMalloc", "cudaLaunchCooperativeKernel", "cudaMemsetAsync"]
    device = ["gemm", "Memcpy HtoD"]
    assert tally([*((name, False) for name in host), *((name, True) for name in device)]) == {
        "launches": 6,
        "kernels": 2,
        "host_synchronisations": 1,
    }
    unseen = {"launches": None, "kernels": None, "host_synchronisations": None}
    assert tally([("cudaDeviceSynchronize", False)]) == unseen


def record(group: str, seconds: float, extra: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {
        "name": f"test[{group}]",
        "group": group,
        "params": params or None,
        "stats": {"median": seconds},
        "extra_info": {"shape": "tiny", "bytes": 1_000_000, **extra},
    }


def write(folder: Path, name: str, *benchmarks: dict[str, Any], left_out: tuple[Any, ...] = ()) -> None:
    machines = {"cpu": {}, "cuda": MACHINE}
    document = {"machine_info": {"kvspn": machines}, "benchmarks": benchmarks, "left_out": left_out}
    (folder / f"bench-{name}.json").write_text(json.dumps(document), "utf-8")


def test_summary_of_a_run(tmp_path: Path) -> None:
    device = {"device_ms": 1.0, "launches": 1, "kernels": 99}
    seconds = {"greedy": 0.002, "two rows": 0.0022, "k=1": 0.003}
    steps = [
        record(f"step, {kind}", each, device, backend="cuda graph", kind=kind, batch=4)
        for kind, each in seconds.items()
    ]
    peer = record("step, greedy", 0.004, {}, peer="transformers eager", rows=1)
    write(tmp_path, "step", *steps, peer, left_out=({"name": "test[flash]", "reason": "not here"},))
    write(tmp_path, "ops", record("append_kv", 0.001, device))

    found = summary(tmp_path, tokens_per_step=1.5)
    assert found["machine"] == MACHINE
    assert [row["name"] for row in found["rows"]] == [
        "test[append_kv]",
        *["cuda graph"] * 3,
        "transformers eager",
    ]
    step = found["rows"][1]
    assert (step["ms"], step["gb_per_s"], step["percent_of_copy"]) == pytest.approx((2.0, 1.0, 0.05))
    assert found["rows"][-1]["gb_per_s"] == pytest.approx(0.25)  # by the caller's clock, without a device's
    (costs,) = found["costs"]
    assert (costs["name"], costs["batch"]) == ("cuda graph", 4)
    assert costs["two_row_cost"] == pytest.approx(1.1)
    assert costs["draft_overhead"] == pytest.approx(0.5)
    assert (costs["ms_per_token_greedy"], costs["ms_per_token"]) == pytest.approx((2.0, 2.0))

    write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text("utf-8"))["rows"] == found["rows"]
    assert (tmp_path / "summary.md").read_text("utf-8").startswith("# ")

    lines = page(found).splitlines()
    assert "| tiny | cuda graph | 4 | 1.10 | 50% | 2.000 | 2.000 |" in lines
    greedy = lines.index("## tiny: step, greedy")
    assert lines[greedy + 4 : greedy + 6] == [
        "| cuda graph | 2.000 | 1.000 | 1.0 | 0% | 1 | 99 |",
        "| transformers eager | 4.000 | – | 0.2 | 0% | – | – |",
    ]
    assert "- test[flash]: not here" in lines


def test_summary_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no record bench-\*\.json here"):
        summary(tmp_path, 1.5)
