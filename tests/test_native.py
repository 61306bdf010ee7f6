"""The C++ engine against the reference, on every instruction set and number of threads."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from kvspn import ops
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.ops.fused_linear import reference
from kvspn.weights import DecoderWeights
from kvspn.weights.decoder import named_tensors
from kvspn.weights.random import random_decoder
from support.caches import contents, poison, random_states, tokens_of

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")

SHAPES = {
    "plain": {"blocks": 0},
    "flattened": {"layers": 4, "blocks": 2},
    "ablations": {"layers": 4, "blocks": 2, "last_layer_only": True, "encoder_attention": False},
    "strided": {"layers": 4, "blocks": 2, "encoder_stride": 3},
    "two blocks a group": {"layers": 4, "blocks": 4, "groups": 2},
    "wide": {"heads": 3, "head_dim": 64, "ffn": 200, "vocabulary": 301, "layers": 3, "blocks": 3},
    "odd": {"heads": 3, "head_dim": 5, "ffn": 37, "vocabulary": 131, "draft_heads": 6},
    "short list": {"vocabulary": 150, "short_list": 70},
    "fp8": {"quantised": "fp8", "vocabulary": 67, "ffn": 37},
    "fp8 wide": {"quantised": "fp8", "heads": 3, "head_dim": 64, "ffn": 520, "layers": 3, "blocks": 3},
    "int8": {"quantised": "int8", "vocabulary": 67},
    "int8 wide": {"quantised": "int8", "heads": 3, "head_dim": 64, "ffn": 600, "layers": 3, "blocks": 3},
    "int4": {"quantised": "int4", "vocabulary": 67},
    "int4 wide": {"quantised": "int4", "heads": 3, "head_dim": 64, "ffn": 520, "layers": 3, "blocks": 3},
}


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512vnni"])
def instruction_set(request, monkeypatch):
    """Kernels of one instruction set, where the machine has it."""
    monkeypatch.setenv("KVSPN_CPU", request.param)
    try:
        engine("native", random_decoder(), batch=1, capacity=4, cross_capacity=4)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    return request.param


def decode(
    backend: str,
    weights: DecoderWeights,
    rows: list[int],
    k: int = 1,
    draft: bool = True,
    threads: int = 1,
    kv: str | None = None,
):
    """Three utterances, of which `rows` are decoded together, in buffers full of NaN: tokens and caches."""
    states = random_states(weights, (7, 1, 19))
    prompts = [[1, 2, 3], [4], list(range(5, 24))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        e = engine(backend, weights, batch=len(rows), capacity=40, cross_capacity=21, kv=kv)
    finally:
        torch.set_num_threads(before)
    poison(e.cache)
    e.start([states[r] for r in rows], [prompts[r] for r in rows], eos=0, max_length=40)
    draft = draft and bool(weights.blocks)
    while not e.finished.all():
        e.step(k, draft=draft)
    return tokens_of(e), contents(e.cache), e


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(instruction_set, shape):
    """The same tokens and statistics, and a cache within fp32's rounding, or that of int16 activations."""
    compare_with_reference(shape, (1, 2, K_INF))


@pytest.mark.parametrize("shape", ["flattened", "wide", "odd", "int8 wide", "int4"])
def test_int8_caches_equal_the_reference(instruction_set, shape):
    """Up to one step of int8, where fp32's rounding decides."""
    compare_with_reference(shape, (2,), kv="int8")


def compare_with_reference(shape, ks, kv=None):
    weights = random_decoder(positions=40, **SHAPES[shape])
    tolerance = 2e-3 if "int" in shape else 2e-4
    for k in ks:
        expected, caches, reference = decode("reference", weights, [0, 1, 2], k, kv=kv)
        tokens, found, native = decode("native", weights, [0, 1, 2], k, threads=2, kv=kv)
        assert tokens == expected
        assert torch.equal(native.stats, reference.stats)
        for one, other in zip(found, caches, strict=True):
            step = other.abs().max() / 127 if kv else 0
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance + float(step))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("shape", "dtype", "kv"),
    [
        *itertools.product(["wide", "odd", "fp8 wide", "int8 wide", "int4 wide"], DTYPES, [None]),
        ("wide", torch.bfloat16, "int8"),
        ("odd", torch.float32, "int8"),
    ],
)
def test_row_invariance_bit_for_bit(instruction_set, shape, dtype, kv):
    """A row's cache does not depend on drafts, on the other rows or on threads."""
    weights = random_decoder(positions=40, dtype=dtype, **SHAPES[shape])
    tokens, caches, _ = decode("native", weights, [0, 1, 2], draft=False, kv=kv)
    for threads in (1, 2, 3):
        drafted, found, _ = decode("native", weights, [0, 1, 2], threads=threads, kv=kv)
        assert drafted == tokens
        assert all(torch.equal(one, other) for one, other in zip(found, caches, strict=True))
    for row in range(3):
        alone, found, _ = decode("native", weights, [row], threads=2, kv=kv)
        assert alone == [tokens[row]]
        assert torch.equal(found[0], caches[row])


@pytest.mark.parametrize(
    ("shape", "kv"),
    [("wide", None), ("fp8 wide", None), ("int8 wide", None), ("int4 wide", None), ("wide", "int8")],
)
def test_wide_instruction_sets_agree_to_the_bit(monkeypatch, shape, kv):
    """Sums have one order in vectors of 16 on all of them; portable code alone lacks fused multiply-add."""
    weights = random_decoder(positions=40, **SHAPES[shape])
    results = []
    for name in ("avx2", "avx512", "avx512vnni"):
        monkeypatch.setenv("KVSPN_CPU", name)
        try:
            results.append(decode("native", weights, [0, 2], kv=kv)[1])
        except ValueError:
            pytest.skip(f"no {name} here")
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "groups"), [("fp32", 1), ("bf16", 1), ("fp8", 1), ("int8", 1), ("int4", 4), ("int4", 22)]
)
def test_matrices_as_they_lie_on_every_instruction_set(monkeypatch, set_threads, dtype, groups):
    """Those of the reference, for any number of rows and threads; wide instruction sets agree to the bit."""
    x, weight, scale = torch.randn(6, 66), torch.randn(2003, 66), None
    if dtype == "bf16":
        weight = weight.bfloat16()
    elif dtype == "fp8":
        weight, scale = (weight * 40).to(torch.float8_e4m3fn), torch.rand(2003) / 40
    elif dtype == "int8":
        weight, scale = (weight * 40).clamp(-127, 127).to(torch.int8), torch.rand(2003)
    elif dtype == "int4":
        x, weight, scale = (
            x[:, :44],
            torch.randint(256, (2003, 22), dtype=torch.uint8),
            torch.rand(2003, groups),
        )
    wide = []
    for name in ("portable", "avx2", "avx512", "avx512vnni"):
        monkeypatch.setenv("KVSPN_CPU", name)
        try:
            found = ops.fused_linear(x, weight, scale=scale)
        except RuntimeError as error:
            assert "KVSPN_CPU must be" in str(error)
            continue
        torch.testing.assert_close(found, reference(x, weight, scale=scale), atol=1e-4, rtol=1e-5)
        set_threads(3)
        assert torch.equal(ops.fused_linear(x[3:4], weight, scale=scale), found[3:4])
        set_threads(1)
        wide += [found] * (name != "portable")
    assert all(torch.equal(wide[0], other) for other in wide[1:])


def test_fp8_from_its_bits(monkeypatch):
    """As uint8 beside a scale [N], since NumPy has no fp8."""
    weights = random_decoder(quantised="fp8", positions=40)
    tokens, caches, _ = decode("native", weights, [0, 1])
    bits = {
        name: tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in named_tensors(weights)
    }
    assert [tensor.dtype for tensor in bits.values()].count(torch.uint8) == 20
    monkeypatch.setattr("kvspn.engines.native.named_tensors", lambda weights: bits.items())
    again, found, _ = decode("native", weights, [0, 1])
    assert again == tokens and all(map(torch.equal, found, caches))


def test_nan_among_fp8_weights_gives_no_token():
    weights = random_decoder(quantised="fp8")
    weights.layers[1].fc2.weight.view(torch.uint8)[3, 5] = 0xFF
    e = engine("native", weights, batch=1, capacity=8, cross_capacity=8)
    e.start(random_states(weights, (7,)), [[1, 2]], eos=-1, max_length=8)
    with pytest.raises(ValueError, match=r"^the logits of row 0 at position 1 must be numbers"):
        e.step(1, False)


def test_int4_in_groups_that_no_block_divides():
    weights = random_decoder(quantised="int4", ffn=34)
    with pytest.raises(
        ValueError, match=r"^layers\.0\.fc2\.scale must divide .* multiple of 8, .* got 17 groups"
    ):
        engine("native", weights, batch=1, capacity=4, cross_capacity=4)


def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("KVSPN_CPU", "sse9")
    with pytest.raises(
        ValueError,
        match=r"^KVSPN_CPU must be amx, avx512bf16, avx512vnni, avx512, avx2 or portable, got sse9",
    ):
        engine("native", random_decoder(), batch=1, capacity=4, cross_capacity=4)


def test_a_damaged_batch_is_refused():
    """State that the caller owns and may have changed is checked before any kernel runs."""
    e = engine("native", random_decoder(), batch=1, capacity=9, cross_capacity=4)
    e.start([torch.randn(3, 16)], [[1, 2]], eos=-1, max_length=9)
    for name, value, message in (
        ("lengths", 9, r"^lengths\[0\] must be 0 to 8, got 9"),
        ("tokens", 29, r"^tokens must be 0 to 28, got 29"),
    ):
        kept = getattr(e, name).clone()
        getattr(e, name).fill_(value)
        with pytest.raises(ValueError, match=message):
            e.step()
        getattr(e, name).copy_(kept)
    e.step()


def test_numpy_alone_drives_the_engine():
    """The module takes any DLPack tensor; here from NumPy, with weights that are views of one buffer."""
    np = pytest.importorskip("numpy")
    from kvspn import _native

    weights = random_decoder()
    named = {name: tensor.numpy() for name, tensor in named_tensors(weights)}
    native = _native.Engine(named, layers=2, heads=2, blocks=1, groups=1, last_layer_only=False, threads=1)
    tokens = np.zeros((1, 12), np.int32)
    tokens[0, :2] = 3, 5
    batch = {
        "kv": np.full((2, 2, 1, 2, 12, 8), np.nan, np.float32),
        "lengths": np.zeros(1, np.int32),
        "tokens": tokens,
        "finished": np.zeros(1, np.bool_),
        "stats": np.zeros((1, 3), np.int32),
        "cross_kv": np.full((2, 2, 1, 2, 6, 8), np.nan, np.float32),
        "cross_lengths": np.zeros(1, np.int32),
    }
    native.bind(**batch)
    states = np.random.default_rng(0).standard_normal((4, 16), np.float32)
    native.encode(0, states)
    native.prefill(0, 1)
    while not batch["finished"][0]:
        native.step(k=1, eos=-1, max_length=12, draft=True)
    reference = engine("reference", weights, batch=1, capacity=12, cross_capacity=6)
    reference.start([torch.from_numpy(states)], [[3, 5]], eos=-1, max_length=12)
    while not reference.finished.all():
        reference.step()
    assert tokens.tolist() == reference.tokens.tolist()
    for name, wrong, message in (
        ("kv", np.zeros((2, 2, 1, 2, 12, 7), np.float32), r"^kv must have shape \[2, 2, any, 2, any, 8\]"),
        ("lengths", np.zeros(1, np.int64), "^lengths must be fp32, bf16 "),
        ("stats", np.zeros((1, 3), np.float32), "^stats must be int32, got fp32"),
        ("tokens", np.zeros((12, 1), np.int32).T[:, ::2], "^tokens must be contiguous"),
        (
            "finished",
            [False],
            "^finished must be an array with a buffer or a tensor with __dlpack__, got list",
        ),
        ("kv", np.zeros_like(batch["kv"], np.int8), "^cross_kv must be int8, got fp32"),
        ("kv_scale", batch["kv"][..., 0], "^kv_scale must be a null pointer without int8 caches"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            native.bind(**(batch | {name: wrong}))


WITHOUT_TORCH = """
import sys
import numpy as np
sys.modules["torch"] = None
from kvspn import _native
data, library = sys.argv[1:]
array = __import__(library).numpy.asarray if library == "jax" else np.asarray
given = {name: array(value) for name, value in np.load(data).items()}
states = given.pop("states")
engine = _native.Engine(given, layers=2, heads=2, blocks=1, groups=1, last_layer_only=False, threads=1)
batch = {
    "kv": np.full((2, 2, 1, 2, 12, 8), np.nan, np.float32),
    "lengths": np.zeros(1, np.int32),
    "tokens": np.full((1, 12), 3, np.int32),
    "finished": np.zeros(1, np.bool_),
    "stats": np.zeros((1, 3), np.int32),
    "cross_kv": np.full((2, 2, 1, 2, 6, 8), np.nan, np.float32),
    "cross_lengths": np.zeros(1, np.int32),
}
engine.bind(**batch)
engine.encode(0, states)
engine.prefill(0, 1)
while not batch["finished"][0]:
    engine.step(k=1, eos=-1, max_length=12, draft=True)
print(batch["tokens"].tolist())
"""


@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_without_torch(library, tmp_path):
    """Weights and encoder states as NumPy's or JAX's arrays, in a process that cannot import torch."""
    pytest.importorskip(library)
    weights = random_decoder()
    states = torch.randn(4, 16)
    data = {name: tensor.numpy() for name, tensor in named_tensors(weights)}
    numpy.savez(tmp_path / "data.npz", states=states.numpy(), **data)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "data.npz"), library],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    reference = engine("reference", weights, batch=1, capacity=12, cross_capacity=6)
    reference.start([states], [[3, 3]], eos=-1, max_length=12)
    while not reference.finished.all():
        reference.step()
    assert done.stdout == f"{reference.tokens.tolist()}\n", done.stderr
