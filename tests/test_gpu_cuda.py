"""The CUDA engine on a GPU: what test_cuda.py asks of the emulation, and what only a device can show."""

import itertools
import random
import time

import pytest
import torch

from kvspn.decoding import decode
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder
from support.caches import contents, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or backends()["cuda"] is not None, reason="no CUDA device, or not built"
    ),
]

MODES = ("persistent", "graph", "kernels")
WIDE = {
    "heads": 4,
    "head_dim": 64,
    "layers": 4,
    "blocks": 2,
    "ffn": 1024,
    "vocabulary": 3001,
    "positions": 200,
}


def run(backend: str, weights: DecoderWeights, rows: list[int], kv: str | None = None, **options: object):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(n, weights.embed_tokens.shape[1], generator=generator).cuda() for n in (150, 1, 64)]
    prompts = [[1, 2, 3], [4], list(range(5, 70))]
    e = engine(backend, weights, batch=len(rows), capacity=200, cross_capacity=150, kv=kv)
    poison(e.cache)
    made = decode(e, [states[r] for r in rows], [prompts[r] for r in rows], eos=0, max_length=200, **options)
    return made.sequences, e


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """A way to run. Each can be chosen by -k, and is compared with single kernels, the simplest."""
    monkeypatch.setenv("KVSPN_CUDA_STEP", request.param)
    return request.param


@pytest.mark.parametrize(
    ("quantised", "kv"), [(None, None), ("fp8", None), ("int8", None), ("int4", None), (None, "int8")]
)
def test_tokens(monkeypatch, mode, quantised, kv, dtype):
    """k = 1 is greedy, to the bit, in every mode and batch; in fp32 the tokens are the reference's."""
    weights = random_decoder(dtype=dtype, quantised=quantised, **WIDE).to("cuda")
    monkeypatch.setenv("KVSPN_CUDA_STEP", "kernels")
    greedy, _ = run("cuda", weights, [0, 1, 2], kv, draft=False)
    monkeypatch.setenv("KVSPN_CUDA_STEP", mode)
    for rows in ([0, 1, 2], [2], [1, 0]):
        assert run("cuda", weights, rows, kv, k=1)[0] == [greedy[row] for row in rows]
    if dtype == torch.float32 and kv is None:  # a step of int8 apart, tokens may differ
        assert greedy == run("reference", weights, [0, 1, 2], draft=False)[0]


def test_rollbacks_equal_those_of_single_launches(monkeypatch, mode):
    """1,000 random accepts, rejects and rollbacks by hand."""
    draws = random.Random(0)
    steps = [(draws.choice((1, 2, 5, K_INF)), draws.random() < 0.8, draws.randrange(4)) for _ in range(1000)]
    weights = random_decoder(**WIDE).to("cuda")
    runs = []
    for way in ("kernels", mode):
        monkeypatch.setenv("KVSPN_CUDA_STEP", way)
        e = engine("cuda", weights, batch=2, capacity=200, cross_capacity=5)
        e.start(torch.ones(2, 5, 256, device="cuda"), [[1], [2, 3]], eos=-1, max_length=200)
        run = []
        for k, draft, back in steps:
            e.step(k, draft)
            run.append(e.tokens.clone())
            e.lengths.copy_((e.lengths - back).clamp_(min=0))
            e.lengths.copy_(torch.where(e.lengths > 190, 3, e.lengths))
            e.finished.fill_(False)
        runs.append(torch.stack(run))
    assert torch.equal(*runs)


@pytest.mark.parametrize("kv", [None, "int8"])
def test_lengths_at_and_past_every_block(mode, dtype, kv):
    weights = random_decoder(dtype=dtype, **WIDE).to("cuda")
    lengths = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65)
    for length, cross in zip(lengths, itertools.cycle((33, 32, 31, 1)), strict=False):
        tokens, caches = [], []
        for name in ("reference", "cuda"):
            e = engine(name, weights, batch=1, capacity=length + 3, cross_capacity=cross, kv=kv)
            poison(e.cache)
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(29, (length + 1,), generator=generator).tolist()
            states = torch.randn(1, cross, 256, generator=generator).cuda()
            e.start(states, [ids], eos=-1, max_length=length + 3)
            e.step(K_INF)
            tokens.append(e.tokens.tolist())
            caches += contents(e.cache)
            assert not caches[-1].isnan().any()
        if dtype == torch.float32:
            assert tokens[0] == tokens[1] or kv
            step = float(caches[0].abs().max()) / 127 if kv else 0
            torch.testing.assert_close(caches[1], caches[0], rtol=2e-3, atol=2e-3 + step)


def test_two_engines_on_two_streams(mode):
    """They take turns, while the default stream is busy, and each makes the tokens that it makes alone."""
    weights, streams = random_decoder(**WIDE).to("cuda"), [torch.cuda.Stream() for _ in range(2)]
    engines = [engine("cuda", weights, batch=1, capacity=200, cross_capacity=64) for _ in streams]
    states = torch.randn(2, 1, 64, 256, generator=torch.Generator().manual_seed(0)).cuda()

    def start(i: int) -> None:
        engines[i].start(states[i], [[i]], eos=-1, max_length=200)

    alone = []
    for i, e in enumerate(engines):
        start(i)
        while not e.finished.all():
            e.step()
        alone.append(e.tokens.clone())
    torch.cuda.synchronize()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            start(i)
            engines[i].step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    for _ in range(198):
        for e, stream in zip(engines, streams, strict=True):
            with torch.cuda.stream(stream):
                e.step()
    for stream in streams:
        stream.synchronize()
    # Nobody waited for it. What sleeps there keeps a multiprocessor, and a persistent step needs them all.
    assert mode == "persistent" or not torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    assert all(torch.equal(e.tokens, tokens) for e, tokens in zip(engines, alone, strict=True))
    assert not torch.equal(*alone)


@pytest.mark.parametrize("mode", ["persistent"], indirect=True)
def test_an_utterance_in_one_launch_streams(mode):
    """The host reads tokens while the kernel runs, in order and each once."""
    weights = random_decoder(**WIDE).to("cuda")
    e = engine("cuda", weights, batch=1, capacity=200, cross_capacity=64)
    e.start(torch.ones(1, 64, 256, device="cuda"), [[1]], eos=-1, max_length=200)
    torch.cuda.synchronize()
    e.run(1, steps=200)
    seen = [0]
    deadline = time.monotonic() + 10
    while seen[-1] < 199 and time.monotonic() < deadline:
        count = len(e.progress(0))
        assert count >= seen[-1]
        if count > seen[-1]:
            seen.append(count)
    assert len(seen) > 3  # not all at once, at the end
    assert e.progress(0) == e.tokens[0, 1:200].tolist()
