"""The CUDA kernels on the host: every way to run a step, with the threads in any order."""

import os
import random
import threading
from ctypes import byref

import numpy as np
import pytest
import torch

from kvspn.engines import engine
from kvspn.ops import K_INF
from kvspn.ops.append_kv import quantise
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder
from support import abi, emulated
from support.caches import contents, poison, random_states, tokens_of

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
    "two blocks a group": {"layers": 4, "blocks": 4, "groups": 2},
    "wide": {"heads": 1, "head_dim": 64, "ffn": 200, "vocabulary": 101},
    "short list": {"heads": 3, "vocabulary": 90, "short_list": 40},
    "fp8": {"quantised": "fp8", "heads": 1, "head_dim": 64, "ffn": 37},
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


def decode(
    backend: str,
    weights: DecoderWeights,
    rows: list[int],
    k: int = 1,
    draft: bool = True,
    kv: str | None = None,
):
    """Utterances, of which `rows` are decoded together, in buffers full of NaN: tokens and caches."""
    states = random_states(weights, (7, 1, 12))
    prompts = [list(range(3, 15)), list(range(13)), list(range(5, 24))]
    e = engine(backend, weights, batch=len(rows), capacity=24, cross_capacity=13, kv=kv)
    poison(e.cache)
    e.start([states[r] for r in rows], [prompts[r] for r in rows], eos=0, max_length=24)
    draft = draft and bool(weights.blocks)
    while not e.finished.all():
        e.step(k, draft=draft)
    return tokens_of(e), contents(e.cache), e.stats.clone()


def same_bits(ours, theirs) -> bool:
    return ours[0] == theirs[0] and all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(configure, shape):
    """The same tokens and statistics, and a cache within fp32's rounding."""
    compare_with_reference(configure, random_decoder(positions=24, **SHAPES[shape]))


@pytest.mark.parametrize("shape", ["flattened", "ablations", "wide", "int8"])
def test_int8_caches_equal_the_reference(configure, shape):
    """Up to one step of int8, where fp32's rounding decides."""
    weights = random_decoder(positions=24, **({"head_dim": 16} | SHAPES[shape]))
    compare_with_reference(configure, weights, kv="int8")


def compare_with_reference(configure, weights, kv=None):
    for k, mode in zip((1, 2, K_INF), MODES, strict=True):
        configure(mode, seed=k)
        expected, caches, stats = decode("reference", weights, [0, 1, 2], k, kv=kv)
        tokens, found, ours = decode("cuda", weights, [0, 1, 2], k, kv=kv)
        assert tokens == expected
        assert torch.equal(ours, stats)
        for one, other in zip(found, caches, strict=True):
            step = float(other.abs().max()) / 127 if kv else 0
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 + step)


def test_int8_caches_are_those_of_fp32_quantised(configure):
    """To the bit, where nothing before depends on them: the encoder's, and the first layer's."""
    configure("kernels")
    weights = random_decoder(heads=2, head_dim=48, layers=2, positions=40)
    states, prompts = torch.randn(2, 9, 96), [list(range(29)), [1, 2, 3]]
    plain, int8 = (
        engine("cuda", weights, batch=2, capacity=40, cross_capacity=11, kv=kv) for kv in (None, "int8")
    )
    for e in (plain, int8):
        poison(e.cache)
        e.start(states, prompts, eos=-1, max_length=40)
    cross = quantise(plain.cache.cross_kv[..., :9, :])
    assert torch.equal(int8.cache.cross_kv[..., :9, :], cross[0])
    assert torch.equal(int8.cache.cross_kv_scale[..., :9], cross[1])
    for row, ids in enumerate(prompts):
        end = len(ids) - 1
        values, scale = quantise(plain.cache.kv[0, :, row, :, :end])
        assert torch.equal(int8.cache.kv[0, :, row, :, :end], values)
        assert torch.equal(int8.cache.kv_scale[0, :, row, :, :end], scale)
        assert int8.cache.kv_scale[:, :, row, :, end:].isnan().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "kv"),
    [
        ("wide", torch.float32, None),
        ("wide", torch.bfloat16, None),
        ("wide", torch.float16, None),
        ("wide", torch.bfloat16, "int8"),
        ("fp8", torch.bfloat16, None),
        ("int4", torch.bfloat16, None),
    ],
)
def test_row_invariance_bit_for_bit(configure, shape, dtype, kv):
    """Not drafts, other rows, the order of threads, the device's size or the way steps run show in a bit."""
    weights = random_decoder(positions=24, dtype=dtype, **SHAPES[shape])
    expected = decode("cuda", weights, [0, 2], draft=False, kv=kv)
    settings = ({"seed": 1}, {"multiprocessors": 1}, {"multiprocessors": 5, "shared_bytes": 22 << 10})
    for mode, setting in zip(MODES, settings, strict=True):
        configure(mode, **setting)
        assert same_bits(decode("cuda", weights, [0, 2], kv=kv), expected)
    tokens, caches, _ = expected
    assert same_bits(decode("cuda", weights, [2], kv=kv), (tokens[1:], caches[1:]))


@pytest.mark.parametrize(
    ("kv", "lengths"),
    [
        (None, ((1, 33), (15, 32), (16, 31), (17, 17), (31, 16), (32, 15), (33, 1), (16, 16), (32, 1))),
        ("int8", ((1, 33), (30, 32), (31, 31), (32, 1), (33, 32))),
    ],
)
def test_lengths_at_and_past_every_block(configure, kv, lengths):
    """At head width 64 a split is 16 positions in fp32, 32 in int8: one more and one less, of both caches."""
    weights = random_decoder(heads=1, head_dim=64, layers=2, blocks=1, positions=40)
    for length, cross in lengths:
        results = []
        for name in ("reference", "cuda"):
            e = engine(name, weights, batch=1, capacity=length + 3, cross_capacity=cross, kv=kv)
            poison(e.cache)
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(29, (length + 1,), generator=generator).tolist()
            e.start([torch.randn(cross, 64, generator=generator)], [ids], eos=-1, max_length=length + 3)
            e.step(K_INF)
            results.append((e.tokens, contents(e.cache)[0]))
        assert torch.equal(results[0][0], results[1][0])
        step = float(results[0][1].abs().max()) / 127 if kv else 0
        torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-4, atol=2e-4 + step)


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


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_engines_on_streams(configure, monkeypatch, mode, kv):
    """Each puts all of its work on the current stream, and two that take turns make the tokens of one."""
    configure(mode)
    weights, streams = random_decoder(heads=1, head_dim=16), [emulated.stream() for _ in range(2)]

    def start(seed: int, stream: int):
        monkeypatch.setattr("kvspn.engines.cuda.current_stream", lambda device: stream)
        e = engine("cuda", weights, batch=1, capacity=20, cross_capacity=5, kv=kv)
        assert 0 not in emulated.streams_used()
        states = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
        e.start(states, [[seed, 2]], eos=-1, max_length=20)
        assert emulated.streams_used() == {stream}
        return e

    def step(e, stream: int) -> None:
        monkeypatch.setattr("kvspn.engines.cuda.current_stream", lambda device: stream)
        e.step()
        e.run(draft=False, steps=2)
        assert emulated.streams_used() == {stream}

    emulated.streams_used()
    alone = []
    for seed, stream in enumerate(streams):
        e = start(seed, stream)
        for _ in range(4):
            step(e, stream)
        alone.append(e.tokens)
    pair = [start(seed, stream) for seed, stream in enumerate(streams)]
    for _ in range(4):
        for e, stream in zip(pair, streams, strict=True):
            step(e, stream)
    assert all(torch.equal(e.tokens, tokens) for e, tokens in zip(pair, alone, strict=True))
    assert not torch.equal(*alone)


def test_every_call_of_the_c_abi_keeps_to_its_stream():
    lib = abi.library(emulated.PATH)
    status, made = abi.create(lib, abi.random_weights(), abi.params(device=1))
    assert status == abi.OK
    values, stream = abi.arrays(), emulated.stream()
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    steps = abi.generate(first_mask=np.zeros(29, np.float32), max_steps=2, on_step=lambda _: 0)
    emulated.streams_used()
    for call, arguments in (
        ("set_stream", (stream,)),
        ("bind", (byref(abi.batch(values)),)),
        ("encode", (0, byref(states))),
        ("prefill", (0, 2)),
        ("step", (byref(abi.step()),)),
        ("generate", (byref(steps),)),
        ("read_statistics", (0, byref(abi.Statistics(40)))),
        ("rollback", (0, 2)),
        ("reset", ()),
    ):
        assert getattr(lib, f"kvspn_engine_{call}")(made, *arguments) == abi.OK, lib.kvspn_last_error()
        assert emulated.streams_used() == (set() if call == "set_stream" else {stream}), call
    lib.kvspn_engine_destroy(made)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_stays_on_its_device(configure, mode):
    """Whatever device is the present one when it is called; and that one stays it."""
    configure(mode, device=1)
    e = engine("cuda", random_decoder(), batch=1, capacity=9, cross_capacity=4)
    present, launched_on = emulated.setting("device"), emulated.setting("launched_on")
    for call in (lambda: e.start([torch.randn(3, 16)], [[1, 2]], eos=-1, max_length=9), e.step):
        present.value, launched_on.value = 0, -1
        call()
        assert (present.value, launched_on.value) == (0, 1)


def test_an_engine_waits_for_its_kernels_before_it_goes(configure):
    """Else the emulation ends the program: they write to pinned memory."""
    configure("persistent")
    e = engine("cuda", random_decoder(), batch=1, capacity=9, cross_capacity=4)
    e.start([torch.randn(3, 16)], [[1, 2]], eos=-1, max_length=9)
    e.run(draft=False, steps=3)
    del e


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


def test_a_row_whose_length_is_past_its_tokens_is_left_alone():
    """A batch may hold fewer tokens than its cache has places."""
    lib = abi.library(emulated.PATH)
    status, made = abi.create(lib, abi.random_weights(), abi.params(device=1))
    assert status == abi.OK
    values = abi.arrays(rows=2)
    values["tokens"] = np.full((2, 8), 3, np.int32)
    assert lib.kvspn_engine_bind(made, byref(abi.batch(values))) == abi.OK
    states = abi.Tensor.of("states", np.ones((4, 16), np.float32))
    for row in range(2):
        assert lib.kvspn_engine_encode(made, row, byref(states)) == abi.OK
    for length in (8, 11):
        values["lengths"][0] = length
        before = {name: value[0].copy() for name, value in values.items() if name not in ("kv", "cross_kv")}
        assert lib.kvspn_engine_step(made, byref(abi.step(max_length=8))) == abi.OK
        for name, value in before.items():
            assert np.array_equal(values[name][0], value), name
    assert values["stats"][1, 0] == 2
    lib.kvspn_engine_destroy(made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_no_device(configure):
    """A device is its parent's: the engine says so, for every call, and goes without a hang."""
    e = engine("cuda", random_decoder(heads=1, head_dim=16), batch=1, capacity=9, cross_capacity=4)
    e.start(torch.ones(1, 4, 16), [[1, 2]], eos=-1, max_length=9)
    child = os.fork()
    if not child:
        refused = 0
        try:
            for call in (
                e.step,
                e.profile,
                lambda: e.start(torch.ones(1, 4, 16), [[1]], eos=-1, max_length=9),
            ):
                try:
                    call()
                except RuntimeError as error:
                    refused += "the process that made it" in str(error)
            del e
        finally:
            os._exit(refused)
    deadline = threading.Timer(60, os.kill, (child, 9))
    deadline.start()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    deadline.cancel()
    e.run(steps=20)
    assert e.finished.all()


def test_absurd_encoder_lengths_see_no_more_than_there_is(configure):
    """As the cache's end does; 2^31 - 1 does not wrap."""
    weights = random_decoder(layers=4, blocks=2, encoder_stride=3)
    runs = []
    for length in (4, 5, 2**31 - 1):
        e = engine("cuda", weights, batch=1, capacity=9, cross_capacity=4)
        e.start(torch.ones(1, 4, 16), [[1, 2]], eos=-1, max_length=9)
        e.cache.cross_lengths.fill_(length)
        e.step(K_INF)
        runs.append(e.tokens)
    assert all(torch.equal(run, runs[0]) for run in runs)


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
