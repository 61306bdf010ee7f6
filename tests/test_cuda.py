"""The CUDA kernels on the host: every way to run a step, with the threads in any order."""

import itertools
import random

import emulated
import pytest
import torch

from kvspn.engines import engine
from kvspn.ops import K_INF, DecoderWeights
from kvspn.random_decoder import random_decoder

pytestmark = pytest.mark.skipif(
    not emulated.PATH.exists() or torch.cuda.is_available(),
    reason="not built: KVSPN_CUDA=emulate python setup.py build_ext",
)

MODES = ("persistent", "graph", "kernels")
SHAPES = {
    "plain": {"blocks": 0},
    "flattened": {"layers": 4, "blocks": 2, "draft_heads": 4, "ffn": 37},
    "ablations": {"layers": 4, "blocks": 2, "last_layer_only": True, "encoder_attention": False},
    "strided": {"layers": 4, "blocks": 2, "encoder_stride": 3},
    "wide": {"heads": 1, "head_dim": 64, "ffn": 200, "vocabulary": 101},
    "short list": {"heads": 3, "vocabulary": 90, "short_list": 40},
    "int8": {"quantised": "int8", "heads": 1, "head_dim": 64, "ffn": 600},
    "int4": {"quantised": "int4", "vocabulary": 67, "ffn": 576},
}


@pytest.fixture
def configure(monkeypatch):
    """configure(mode, seed=...): how steps run, and a setting of the emulation; undone afterwards."""
    before = {name: emulated.setting(name).value for name in emulated.SETTINGS}

    def apply(mode: str, **settings: int) -> None:
        monkeypatch.setenv("KVSPN_CUDA_STEP", mode)
        for name, value in (before | settings).items():
            emulated.setting(name).value = value

    yield apply
    apply("persistent")


def decode(backend: str, weights: DecoderWeights, rows: list[int], k: int = 1, draft: bool = True):
    """Utterances, of which `rows` are decoded together, in buffers full of NaN: tokens and caches."""
    generator = torch.Generator().manual_seed(5)
    d = weights.embed_tokens.shape[1]
    states = [torch.randn(n, d, generator=generator) for n in (7, 1, 12)]
    prompts = [list(range(3, 15)), list(range(13)), list(range(5, 24))]
    e = engine(backend, weights, batch=len(rows), capacity=24, cross_capacity=13)
    e.cache.kv.fill_(torch.nan)
    e.cache.cross_kv.fill_(torch.nan)
    e.start([states[r] for r in rows], [prompts[r] for r in rows], eos=0, max_length=24)
    draft = draft and bool(weights.blocks)
    while not e.finished.all():
        e.step(k, draft=draft)
    counts = e.lengths.tolist()
    tokens = [e.tokens[b, : n + 1].tolist() for b, n in enumerate(counts)]
    return tokens, [e.cache.kv[:, :, b, :, :n].clone() for b, n in enumerate(counts)], e.stats.clone()


def same_bits(ours, theirs) -> bool:
    return ours[0] == theirs[0] and all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(configure, shape):
    """The same tokens and statistics, and a cache within fp32's rounding."""
    weights = random_decoder(positions=24, **SHAPES[shape])
    for k, mode in zip((1, 2, K_INF), MODES, strict=True):
        configure(mode, seed=k)
        expected, caches, stats = decode("reference", weights, [0, 1, 2], k)
        tokens, found, ours = decode("cuda", weights, [0, 1, 2], k)
        assert tokens == expected
        assert torch.equal(ours, stats)
        for one, other in zip(found, caches, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("wide", torch.float32), ("wide", torch.bfloat16), ("wide", torch.float16), ("int4", torch.bfloat16)],
)
def test_row_invariance_bit_for_bit(configure, shape, dtype):
    """Not drafts, other rows, the order of threads, the device's size or the way steps run show in a bit."""
    weights = random_decoder(positions=24, dtype=dtype, **SHAPES[shape])
    expected = decode("cuda", weights, [0, 2], draft=False)
    settings = ({"seed": 1}, {"multiprocessors": 1}, {"multiprocessors": 5, "shared_bytes": 22 << 10})
    for mode, setting in zip(MODES, settings, strict=True):
        configure(mode, **setting)
        assert same_bits(decode("cuda", weights, [0, 2]), expected)
    tokens, caches, _ = expected
    assert same_bits(decode("cuda", weights, [2]), (tokens[1:], caches[1:]))


def test_lengths_at_and_past_every_block(configure):
    """In fp32 at head width 64 a split is 16 positions: one more and one less, of both caches."""
    weights = random_decoder(heads=1, head_dim=64, layers=2, blocks=1, positions=40)
    lengths = (1, 15, 16, 17, 31, 32, 33)
    for length, cross in itertools.chain(zip(lengths, reversed(lengths), strict=True), ((16, 16), (32, 1))):
        results = []
        for name in ("reference", "cuda"):
            e = engine(name, weights, batch=1, capacity=length + 3, cross_capacity=cross)
            e.cache.kv.fill_(torch.nan)
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(29, (length + 1,), generator=generator).tolist()
            e.start([torch.randn(cross, 64, generator=generator)], [ids], eos=-1, max_length=length + 3)
            e.step(K_INF)
            results.append((e.tokens, e.cache.kv[..., : length + 2, :]))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-4, atol=2e-4)


def test_a_graph_with_rollbacks_equals_single_kernels(configure):
    """Random accepts, rejects and rollbacks by hand, on one captured graph."""
    draws = random.Random(0)
    steps = [(draws.choice((1, 2, K_INF)), draws.random() < 0.8, draws.randrange(4)) for _ in range(60)]
    runs = []
    for mode in ("graph", "kernels"):
        configure(mode)
        e = engine("cuda", random_decoder(layers=2), batch=2, capacity=20, cross_capacity=5)
        e.start(torch.ones(2, 5, 16), [[1], [2, 3]], eos=-1, max_length=20)
        run = []
        for k, draft, back in steps:
            e.step(k, draft)
            run.append(e.tokens.clone())
            e.lengths.copy_((e.lengths - back).clamp_(min=0))
            if e.lengths.max() > 15:
                e.lengths.fill_(3)
            e.finished.fill_(False)
        runs.append(run)
    assert all(map(torch.equal, *runs))


def test_errors_of_the_device_name_the_kernel(configure):
    e = engine("cuda", random_decoder(), batch=1, capacity=9, cross_capacity=4)
    e.start([torch.randn(3, 16)], [[1, 2]], eos=-1, max_length=9)
    emulated.setting("failing_launch").value = 0
    with pytest.raises(RuntimeError, match=r"^decoder_step: unspecified launch failure"):
        e.step()
    e.step()
    configure("kernels")
    e = engine("cuda", random_decoder(), batch=1, capacity=9, cross_capacity=4)
    for launch, name in enumerate(("embed", "fused_linear", "flat_kv_attention")):
        emulated.setting("failing_launch").value = 3 + launch  # after encode's: one, and one a layer
        with pytest.raises(RuntimeError, match=rf"^{name}: unspecified launch failure"):
            e.start([torch.randn(3, 16)], [[1, 2]], eos=-1, max_length=9)


def test_a_row_with_an_absurd_length_is_left_alone(configure):
    e = engine("cuda", random_decoder(), batch=2, capacity=9, cross_capacity=4)
    e.start(torch.randn(2, 3, 16), [[1, 2], [3]], eos=-1, max_length=9)
    for length in (-1, 9, 2**31 - 1):
        e.lengths[0] = length
        before = e.tokens[0].clone(), e.stats[0].clone(), e.cache.kv[:, :, 0].clone()
        e.step()
        assert e.lengths[0] == length
        after = e.tokens[0], e.stats[0], e.cache.kv[:, :, 0]
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert e.stats[1, 0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"^kv must have heads of 16 to 512 bytes, a multiple of 16, got 20"),
        ({"quantised": "int4", "ffn": 34}, r"^layers\.0\.fc2\.scale must divide .* groups of 8, 16, 32"),
        ({"ffn": 12_000}, r"^weights must be at most \d+ columns wide on this device, got 12288"),
    ],
)
def test_shapes_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        engine("cuda", random_decoder(**options), batch=1, capacity=9, cross_capacity=4)


def test_an_unknown_way_to_run(monkeypatch):
    monkeypatch.setenv("KVSPN_CUDA_STEP", "eager")
    with pytest.raises(ValueError, match=r"^KVSPN_CUDA_STEP must be persistent, graph or kernels, got eager"):
        engine("cuda", random_decoder(), batch=1, capacity=9, cross_capacity=4)
