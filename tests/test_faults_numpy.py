"""The native engine without torch: NumPy's arrays, read-only, mapped, and in formats it has no name for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kvspn.cli import app
from kvspn.engines import backends
from support.tiny import save_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "numpy_step.py"
pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("numpy_step", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("weights", ["fp16", "fp8", "int8/int4"])
def test_numpy_decodes_like_torch_where_torch_is_refused(example, tmp_path, monkeypatch, weights) -> None:
    """NumPy holds fp8 as the bits in uint8, and the bf16 embeddings beside quantised weights in uint16."""
    file, states = tmp_path / "model.safetensors", tmp_path / "states.npy"
    folder = save_model(tmp_path / "model")
    made = CliRunner().invoke(app, ["quantize", str(file), "--model", str(folder), "--weights", weights])
    assert made.exit_code == 0, made.output
    np.save(states, np.random.default_rng(0).standard_normal((30, 32), np.float32))
    refuse = (
        "import sys, runpy; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", refuse, str(EXAMPLE), str(file), str(states), "es", "en"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    numbers = example.open_file(file)[1]
    monkeypatch.setattr(example, "open_file", lambda path: (load_file(path), numbers))
    assert done.stdout.splitlines()[0] == str(example.main(file, np.load(states), "es", "en"))


def test_mapped_tensors_are_read_only_views(example, tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    folder = save_model(tmp_path / "model")
    assert CliRunner().invoke(app, ["quantize", str(file), "--model", str(folder)]).exit_code == 0
    tensors, _ = example.open_file(file)
    assert set(tensors) == set(load_file(file))
    assert not any(array.flags.writeable for array in tensors.values())
    assert torch.equal(
        torch.from_numpy(tensors["embed_tokens"].copy()).view(torch.bfloat16),
        load_file(file)["embed_tokens"],
    )


def test_what_the_engine_writes_must_be_writable() -> None:
    from kvspn import _native
    from kvspn.weights.decoder import named_tensors
    from kvspn.weights.random import random_decoder

    weights = random_decoder()
    arrays = {name: tensor.numpy() for name, tensor in named_tensors(weights)}
    for array in arrays.values():
        array.setflags(write=False)
    sizes = {"layers": 2, "heads": 2, "blocks": 1, "groups": 1, "last_layer_only": False, "threads": 1}
    engine = _native.Engine(arrays, **sizes)
    state = {
        "kv": np.zeros((2, 2, 1, 2, 8, 8), np.float32),
        "lengths": np.zeros(1, np.int32),
        "tokens": np.zeros((1, 8), np.int32),
        "finished": np.zeros(1, np.bool_),
        "stats": np.zeros((1, 3), np.int32),
        "cross_kv": np.zeros((2, 2, 1, 2, 4, 8), np.float32),
        "cross_lengths": np.zeros(1, np.int32),
    }
    engine.bind(**state)
    state["kv"].setflags(write=False)
    with pytest.raises(ValueError, match="kv must be writable, got a read-only array"):
        engine.bind(**state)
    with pytest.raises(TypeError, match="lengths must be fp32"):
        engine.bind(**{**state, "kv": np.zeros_like(state["kv"]), "lengths": np.zeros(1, np.int64)})
    with pytest.raises(TypeError, match="embed_tokens must be fp32"):
        _native.Engine(arrays | {"embed_tokens": arrays["embed_tokens"].astype(">f4")}, **sizes)
