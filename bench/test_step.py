"""The decoder step on every backend that is here, and transformers' beside it.

Plain greedy, with KVSPN at k = 1 and k = infinity, and two rows: a step whose draft network costs next to
nothing, so that verification remains.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.conftest import foreign
from kvspn.engines import backends, engine
from kvspn.measure.peers import Problem, Skipped, load
from kvspn.measure.shapes import begin, capacities
from kvspn.measure.steps import faint_draft, step_bytes
from kvspn.ops import K_INF
from kvspn.weights import DecoderWeights
from kvspn.weights.formats import FORMATS, quantise

_FORMATS = {fmt.dtype: name for name, fmt in FORMATS.items()}
_DEVICES = {"native": "cpu", "cuda": "cuda", "triton": "cuda"}
_CUDA_STEPS = ("persistent", "graph", "kernels")
BACKENDS = [
    f"{name} {way}".strip() for name in backends() for way in (_CUDA_STEPS if name == "cuda" else ("",))
]
BATCHES = [
    (backend, batch)
    for backend in BACKENDS
    for batch in ((1, 4, 32) if backend in ("cuda persistent", "triton") else (1, 4))
]


@functools.lru_cache(maxsize=1)
def made(shape, fmt) -> DecoderWeights:
    return quantise(shape.weights(), fmt)


@functools.lru_cache(maxsize=2)
def weights(shape, fmt, device, faint: bool) -> DecoderWeights:
    found = made(shape, fmt)
    return (faint_draft(found) if faint else found).to(device)


@functools.lru_cache(maxsize=1)
def problem(shape, device) -> Problem:
    return Problem(shape.weights().to(device), shape.length, shape.encoder_positions)


def heading(kind: str, batch: int) -> str:
    return f"step, {kind}, batch {batch}"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("peer", ["transformers eager", "transformers static"])
def test_peer(timed, request, device, shape, dtype, peer, rows):
    if request.config.getoption("--int8"):
        pytest.skip("transformers takes floats")
    if device == "cpu" and peer == "transformers static":
        pytest.skip("compiled for a GPU's graphs; on a CPU it takes minutes to compile and is no faster")
    try:
        module = load("transformers")
    except Skipped as reason:
        pytest.skip(str(reason))
    task, fmt = problem(shape, device), _FORMATS[dtype]
    size = step_bytes(task.weights, shape, 1, False) * dtype.itemsize // 4
    with foreign(device):
        run, reset = getattr(module, peer.partition(" ")[2])(task, fmt)(rows)
        timed(run, size, reset, heading("greedy" if rows == 1 else "two rows", 1))
        reset()
        logits = run()
    assert task.correct(logits, fmt)


@pytest.mark.parametrize("kind", ["greedy", "two rows", "k=1", "k=inf"])
@pytest.mark.parametrize(
    ("backend", "batch"), BATCHES, ids=lambda value: value if isinstance(value, str) else f"batch{value}"
)
def test_step(timed, request, monkeypatch, device, shape, dtype, backend, kind, batch):
    name, _, way = backend.partition(" ")
    if device != _DEVICES.get(name, device):
        pytest.skip(f"the {name} backend does not run on {device}")
    if missing := backends()[name]:
        pytest.skip(f"{name}: {missing}")
    if way:
        monkeypatch.setenv("KVSPN_CUDA_STEP", way)
    int8 = request.config.getoption("--int8")
    dtype = torch.bfloat16 if int8 else dtype
    w = weights(shape, "int8" if int8 else _FORMATS[dtype], device, kind == "two rows")
    runner = begin(engine(name, w, batch=batch, **capacities(shape)), shape)
    k, draft = K_INF if kind == "k=inf" else 1, kind != "greedy"
    size = step_bytes(w, shape, batch, kind in ("k=1", "k=inf"))

    def back() -> None:
        runner.lengths.fill_(shape.length)

    timed(lambda: runner.step(k, draft), size, back, heading(kind, batch))

    made = (runner.lengths - shape.length).tolist()
    sequences = runner.tokens.tolist()
    assert made == [2] * batch if kind == "k=inf" else all(1 <= count <= 2 for count in made)
    if k == 1 and draft:  # exactly what plain greedy steps make
        back()
        for _ in range(max(made)):
            runner.step(draft=False)
        for row, count in enumerate(made):
            end = shape.length + 1 + count
            assert runner.tokens[row, :end].tolist() == sequences[row][:end]
