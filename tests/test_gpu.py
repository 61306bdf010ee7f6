"""What a CUDA device must add to the CPU's tests: the same results there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kvspn.decoding import DecodeResult, decode
from kvspn.engines import engine
from kvspn.ops import (
    accept_and_rollback,
    append_kv,
    compact_kv,
    decoder_step,
    flat_kv_attention,
    fused_linear,
    lm_head_verify,
)
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
BACKENDS = ["reference", *(["triton"] if find_spec("triton") else [])]
LAYERS, HEADS, WIDTH, ROWS, QUERIES, CAPACITY = 4, 2, 8, 3, 2, 19


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_kv(dtype: torch.dtype, lengths: Tensor, layers: int = LAYERS) -> Tensor:
    """A cache of NaN but for the valid positions of each row."""
    kv = torch.full((layers, 2, ROWS, HEADS, CAPACITY, WIDTH), torch.nan, dtype=dtype)
    for row, length in enumerate(lengths.tolist()):
        kv[:, :, row, :, :length] = torch.randn(layers, 2, HEADS, length, WIDTH, dtype=dtype)
    return kv


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a GPU."""
    return request.param


@pytest.fixture
def on_both(backend: str) -> Callable[..., None]:
    """The comparison of an op on the CPU with the same op of a backend on the GPU."""
    if backend == "reference":
        return lambda op, *args, **kwargs: compare(op, op, *args, **kwargs)
    from kvspn import triton_kernels

    return lambda op, *args, **kwargs: compare(op, getattr(triton_kernels, op.__name__), *args, **kwargs)


def compare(
    op: Callable[..., object], op_there: Callable[..., object], *args: object, **kwargs: object
) -> None:
    """Call ``op`` on the CPU and ``op_there``, with the same arguments, on the GPU; compare results and
    arguments after."""

    def moved(value: object) -> object:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    there = [moved(value) for value in args]
    there_kwargs = {name: moved(value) for name, value in kwargs.items()}
    result, result_there = op(*args, **kwargs), op_there(*there, **there_kwargs)
    for here, other in zip((result, *args), (result_there, *there), strict=True):
        torch.testing.assert_close(other, here, equal_nan=True, check_device=False)


@pytest.mark.parametrize("causal", [True, False])
def test_flat_kv_attention(on_both, dtype, causal):
    lengths = ints(0, 7, CAPACITY - QUERIES)
    q = torch.randn(ROWS, HEADS, QUERIES, WIDTH, dtype=dtype)
    kv = random_kv(dtype, lengths + QUERIES * causal)
    tail = torch.randn(2, ROWS, HEADS, 3, WIDTH, dtype=dtype)
    on_both(flat_kv_attention, q, kv, lengths, causal, tail=tail, tail_lengths=ints(3, 0, 1))


@pytest.mark.parametrize("quantised", [None, "fp8", "int8", "int4"])
def test_fused_linear(on_both, dtype, quantised):
    w = random_decoder(quantised=quantised, dtype=dtype).layers[0]
    x = torch.randn(ROWS, QUERIES, w.fc1.weight.shape[1], dtype=dtype)
    on_both(fused_linear, x, w.fc1.weight, w.fc1.bias, *w.ffn_norm, gelu=True, scale=w.fc1.scale)
    on_both(fused_linear, x, w.self_out.weight, w.self_out.bias, residual=x, scale=w.self_out.scale)


def test_lm_head_verify(on_both, dtype):
    w = random_decoder(dtype=dtype)
    x = torch.randn(ROWS, QUERIES, w.head.weight.shape[1], dtype=dtype)
    mask = torch.zeros(len(w.head.weight))
    mask[::5] = -torch.inf
    on_both(lm_head_verify, x, w.head.weight, ints(1, 2, 5)[:, None], mask, None, *w.norm)


def test_append_and_compact(on_both, dtype):
    lengths = ints(0, 7, CAPACITY - 1)
    k, v = torch.randn(2, ROWS, HEADS, QUERIES, WIDTH, dtype=dtype)
    on_both(append_kv, random_kv(dtype, lengths), k, v, lengths, 1, torch.tensor([False, True, False]))
    source = ints(4, 2, 3, 3, -1, 1, 0, 1, 2).view(ROWS, 3)
    on_both(compact_kv, random_kv(dtype, lengths), ints(2, 1, 0), source, ints(0, 2, 1))


def test_accept_and_rollback(on_both):
    tokens = torch.randint(20, (ROWS, CAPACITY), dtype=torch.int32)
    finished, stats = torch.tensor([False, False, True]), torch.zeros(ROWS, 3, dtype=torch.int32)
    draft, argmax, rank = ints(4, 5, 6)[:, None], torch.full((ROWS, QUERIES), 9).int(), ints(0, 2, 0)[:, None]
    on_both(
        accept_and_rollback,
        *(tokens, ints(3, 4, 5), finished, stats, draft, argmax, rank),
        *(2, 6, CAPACITY),
    )


@pytest.mark.parametrize("use_draft", [True, False])
def test_decoder_step(on_both, use_draft):
    w = random_decoder(layers=LAYERS, blocks=2, heads=HEADS, head_dim=WIDTH)
    lengths = ints(0, 7, CAPACITY - 3)
    cross_lengths = ints(CAPACITY, 1, 5)
    tokens = torch.randint(len(w.embed_tokens), (ROWS, CAPACITY), dtype=torch.int32)
    finished, stats = torch.tensor([False, True, False]), torch.zeros(ROWS, 3, dtype=torch.int32)
    on_both(
        decoder_step,
        *(random_kv(torch.float32, lengths), lengths, tokens, finished, stats),
        *(random_kv(torch.float32, cross_lengths), cross_lengths, w.flatten(), None),
        *(1, -1, CAPACITY, use_draft),
    )


def run(backend: str, weights: DecoderWeights, states: list[Tensor], **options: object) -> DecodeResult:
    device = weights.embed_tokens.device
    runner = engine(backend, weights, batch=ROWS, capacity=24, cross_capacity=9)
    prompt = [[1, 2, 3], [4], [5, 6]]
    return decode(runner, [s.to(device) for s in states], prompt, eos=0, max_length=24, **options)


@pytest.mark.parametrize("seed", range(3))
def test_decode(backend, dtype, seed):
    """k = 1 is greedy on the GPU, token by token; in fp32 the tokens are the CPU's as well."""
    w = random_decoder(layers=LAYERS, blocks=2, heads=HEADS, head_dim=WIDTH, dtype=dtype, seed=seed)
    states = [torch.randn(length, HEADS * WIDTH, dtype=dtype) for length in (9, 1, 5)]
    there = w.to(DEVICE)

    greedy = run(backend, there, states, draft=False)
    assert run(backend, there, states, k=1).sequences == greedy.sequences
    assert run(backend, there, states, k="inf").total.acceptance == 1
    if dtype == torch.float32:
        assert greedy.sequences == run("reference", w, states, draft=False).sequences


def test_no_host_synchronisation_in_a_captured_step():
    """A Triton step that is captured already waits for nothing, whatever it accepts."""
    pytest.importorskip("triton")
    w = random_decoder(layers=LAYERS, blocks=2, heads=HEADS, head_dim=WIDTH)
    there = w.to(DEVICE)
    e = engine("triton", there, batch=ROWS, capacity=24, cross_capacity=9)
    states = torch.randn(ROWS, 9, HEADS * WIDTH, device=DEVICE)
    e.start(states, [[1, 2, 3], [4], [5, 6]], eos=-1, max_length=24)
    e.step()
    before = e.lengths.tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        e.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(new > old for new, old in zip(e.lengths.tolist(), before, strict=True))
