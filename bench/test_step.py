"""The decoder step on every backend that is here: plain greedy, and with KVSPN at k = 1 and k = infinity."""

from __future__ import annotations

import functools

import pytest
import torch
from random_decoder import random_decoder

from bench import nbytes
from kvspn.engines import backends, engine
from kvspn.ops import K_INF, DecoderWeights


@functools.lru_cache(maxsize=1)
def weights(shape, dtype, device) -> DecoderWeights:
    made = random_decoder(
        layers=shape.layers,
        blocks=shape.groups,
        heads=shape.heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        vocabulary=shape.vocabulary,
        positions=448,
        dtype=dtype,
    )
    tensors = [tensor.to(device) for tensor in made.flatten()]
    return DecoderWeights.unflatten(tensors, heads=shape.heads, num_layers=shape.layers)


def step_bytes(w: DecoderWeights, shape, batch: int, draft: bool) -> int:
    """Weights once, each row's keys and values once; with a draft, its weights and its group reads too."""
    parts = [part for layer in w.layers for part in layer._replace(cross_kv=())]
    parts += [w.norm, w.head]
    positions = shape.layers * (shape.length + shape.encoder_positions)
    if draft:
        parts += [part for block in w.blocks for part in block]
        parts += [w.draft_norm, w.draft_output]
        positions += shape.layers * shape.length + shape.groups * shape.encoder_positions
    kv = 2 * positions * shape.width * w.embed_tokens.element_size()
    return nbytes(*(tensor for part in parts for tensor in part)) + batch * kv


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["greedy", "k=1", "k=inf"])
@pytest.mark.parametrize("backend", [name for name, missing in backends().items() if missing is None])
def test_step(timed, device, shape, dtype, backend, kind, batch):
    if backend == "native" and device != "cpu":
        pytest.skip("the native backend runs on the CPU")
    w = weights(shape, dtype, device)
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
