"""The decoder step on every backend that is here: plain greedy, and with KVSPN at k = 1 and k = infinity."""

from __future__ import annotations

import functools

import pytest
import torch

from kvspn.benchmark import step_bytes
from kvspn.engines import backends, engine
from kvspn.ops import K_INF, DecoderWeights
from kvspn.quantisation import FORMATS, quantise

_FORMATS = {dtype: name for name, dtype in FORMATS.items()}


@functools.lru_cache(maxsize=1)
def weights(shape, dtype, device, int8) -> DecoderWeights:
    made = quantise(shape.weights(), "int8" if int8 else _FORMATS[dtype])
    tensors = [tensor.to(device) for tensor in made.flatten()]
    return DecoderWeights.unflatten(tensors, heads=shape.heads, num_layers=shape.layers)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["greedy", "k=1", "k=inf"])
@pytest.mark.parametrize("backend", [name for name, missing in backends().items() if missing is None])
def test_step(timed, request, device, shape, dtype, backend, kind, batch):
    if device != {"native": "cpu", "cuda": "cuda", "triton": "cuda"}.get(backend, device):
        pytest.skip(f"the {backend} backend does not run on {device}")
    int8 = request.config.getoption("--int8")
    dtype = torch.bfloat16 if int8 else dtype
    w = weights(shape, dtype, device, int8)
    capacity = shape.length + 8
    runner = engine(backend, w, batch=batch, capacity=capacity, cross_capacity=shape.encoder_positions)
    states = torch.randn(batch, shape.encoder_positions, shape.width, dtype=dtype, device=device)
    prompt = torch.randint(shape.vocabulary, (batch, shape.length + 1)).tolist()
    runner.start(states, prompt, eos=-1, max_length=capacity)
    k = K_INF if kind == "k=inf" else 1

    def back() -> None:
        runner.lengths.fill_(shape.length)

    timed(lambda: runner.step(k, kind != "greedy"), step_bytes(w, shape, batch, kind != "greedy"), back)

    made = (runner.lengths - shape.length).tolist()
    sequences = runner.tokens.tolist()
    assert made == [2] * batch if kind == "k=inf" else all(1 <= count <= 2 for count in made)
    if kind == "k=1":  # exactly what plain greedy steps make
        back()
        for _ in range(max(made)):
            runner.step(draft=False)
        for row, count in enumerate(made):
            end = shape.length + 1 + count
            assert runner.tokens[row, :end].tolist() == sequences[row][:end]
