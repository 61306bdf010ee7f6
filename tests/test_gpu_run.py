"""What bench/gpu.sh consists of, where no GPU is: the model of time, the stages, a machine's packages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cuda_model, smoke, stages
from kvspn.measure.shapes import SHAPES, Shape, start
from kvspn.weights.formats import quantise
from support import emulated

ROOT = Path(__file__).parents[1]
needs_emulation = pytest.mark.skipif(
    not emulated.PATH.exists() or torch.cuda.is_available(),
    reason="not built: KVSPN_CUDA=emulate python setup.py build_ext",
)


def test_the_documented_model_is_the_present_one():
    """python -m bench.cuda_model"""
    page = cuda_model.page(replace(SHAPES["whisperM2M"], length=448))
    assert page in (ROOT / "docs/cuda.md").read_text("utf-8")


def test_the_model_of_time_reads_what_the_plan_reads():
    pytest.importorskip("kvspn._native")
    shape = replace(SHAPES["miniature"], length=90)
    planned = start("native", quantise(shape.weights(), "fp16"), shape).plan(draft=True)
    modelled = [*cuda_model.draft_stages(shape), *cuda_model.base_stages(shape)]
    assert len(planned) == len(modelled)
    for (name, size), stage in zip(planned, modelled, strict=True):
        if not name.endswith("embed"):  # biases and the step's own positions are not in the model
            assert stage.bytes == pytest.approx(size, rel=0.03), (name, stage.name)


def test_a_stage_ends_when_its_bytes_and_its_chain_have():
    light = cuda_model.Stage("light", 0, ("barrier", "L2"))
    heavy = cuda_model.Stage("heavy", 30_000_000, ("barrier", "L2"))
    chain = cuda_model.LATENCIES["barrier"] + cuda_model.LATENCIES["L2"]
    assert cuda_model.ends([light] * 3) == pytest.approx([chain, 2 * chain, 3 * chain])
    first, second = cuda_model.ends([heavy, heavy])
    assert first > 10  # 30 MB at 3 TB/s
    assert second - first == pytest.approx(10, abs=0.1)  # memory does not wait for the barrier
    assert (
        cuda_model.linear("wide", 4096, 1024, True).chain_us
        > cuda_model.linear("q", 1024, 1024, True).chain_us
    )


@needs_emulation
@pytest.mark.parametrize("mode", ["persistent", "graph", "kernels"])
def test_smoke(monkeypatch, capsys, mode):
    monkeypatch.setenv("KVSPN_CUDA_STEP", mode)
    monkeypatch.setattr(smoke, "SHAPE", smoke.SHAPE | {"heads": 2, "ffn": 64, "vocabulary": 101})
    smoke.main(mode, "cpu", positions=(7, 3))
    assert capsys.readouterr().out.startswith(f"{mode}: the reference's ")


@needs_emulation
def test_stages():
    """A step's, each followed by its barrier, and as many as the model has."""
    shape = Shape(2, 1, 1, 128, 101, 9, 8)
    modelled = [*cuda_model.draft_stages(shape), *cuda_model.base_stages(shape)]
    steps = stages.measure(shape, "cpu", steps=2)
    assert [len(step) for step in steps] == [2 * len(modelled)] * 2
    names = [name for name, _, _ in steps[0]]
    assert set(names[1::2]) == {"barrier"}
    assert names[:3:2] == ["draft.embed", "draft.kv_q"]
    assert names[-2] == "accept"
    rows = stages.summarise(steps, [1.0] * len(modelled))
    assert sum(row["times"] for row in rows) == len(modelled)
    assert [row["bytes"] for row in rows if row["stage"] == "fc1"] == [2 * (2 * 128 * 64 + 4 * 128)]
    assert stages.page(rows).splitlines()[-1].startswith("| all ")


def test_only_a_gpu_machines_packages_are_found():
    code = (
        "import torch, transformers\ntry: import soundfile\nexcept ModuleNotFoundError as error: print(error)"
    )
    environment = {"PYTHONPATH": str(ROOT / "bench/dry"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "No module named 'soundfile' on a GPU machine\n", done.stderr
