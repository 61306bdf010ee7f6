"""The speech encoder in C++ against the formula in float64: formats, shapes, instruction sets, misuse."""

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int32, c_uint32, c_void_p

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kvspn.engines import backends
from kvspn.models.folder import open_model
from kvspn.speech.translator import Translator
from support import tiny
from support.abi import INVALID, OK, Tensor, library

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")

# Bands, width, heads, width of the feed-forward network, layers; tiny.en's and base's widths among them.
SHAPES = {
    "64": (80, 64, 1, 256, 2),
    "384": (80, 384, 6, 1536, 1),
    "512": (80, 512, 8, 2048, 1),
    "128 bands": (128, 64, 4, 100, 1),
    "odd": (5, 33, 3, 50, 2),
    "no layer": (80, 64, 1, 256, 0),
}
ERRORS = {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2}
SETS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")


def random_encoder(shape: str, positions: int, seed: int = 0) -> dict[str, torch.Tensor]:
    bands, width, _, ffn, layers = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    random = lambda *sizes, size=1.0: torch.randn(sizes, generator=generator) * size  # noqa: E731
    weights = {"encoder.embed_positions": random(positions, width)}

    def linear(name, outputs, *inputs):
        weights[f"encoder.{name}.weight"] = random(outputs, *inputs, size=math.prod(inputs) ** -0.5)
        weights[f"encoder.{name}.bias"] = random(outputs, size=0.1)

    def norm(name):
        weights[f"encoder.{name}.weight"] = 1 + random(width, size=0.1)
        weights[f"encoder.{name}.bias"] = random(width, size=0.1)

    linear("conv1", width, bands, 3)
    linear("conv2", width, width, 3)
    for i in range(layers):
        norm(f"layers.{i}.self_norm")
        linear(f"layers.{i}.self_qkv", 3 * width, width)
        linear(f"layers.{i}.self_out", width, width)
        norm(f"layers.{i}.ffn_norm")
        linear(f"layers.{i}.fc1", ffn, width)
        linear(f"layers.{i}.fc2", width, ffn)
    norm("norm")
    return weights


def reference(shape: str, weights: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    _, width, heads, _, layers = SHAPES[shape]
    w = {name.removeprefix("encoder."): tensor.double() for name, tensor in weights.items()}
    of = lambda name: (w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    x = F.gelu(F.conv1d(features.double()[None], *of("conv1"), padding=1))
    x = F.gelu(F.conv1d(x, *of("conv2"), stride=2, padding=1))[0].T
    x = x + w["embed_positions"][: len(x)]
    for i in range(layers):
        layer = f"layers.{i}"
        y = F.linear(F.layer_norm(x, [width], *of(f"{layer}.self_norm")), *of(f"{layer}.self_qkv"))
        q, k, v = (part.view(len(x), heads, -1).transpose(0, 1) for part in y.split(width, 1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(x), width)
        x = x + F.linear(y, *of(f"{layer}.self_out"))
        y = F.gelu(F.linear(F.layer_norm(x, [width], *of(f"{layer}.ffn_norm")), *of(f"{layer}.fc1")))
        x = x + F.linear(y, *of(f"{layer}.fc2"))
    return F.layer_norm(x, [width], *of("norm"))


def encoder(shape, weights, format="fp32", threads=1, **more):
    from kvspn.engines.encoder import NativeEncoder

    _, _, heads, _, layers = SHAPES[shape]
    return NativeEncoder(weights, layers=layers, heads=heads, format=format, threads=threads, **more)


def sound(shape: str, frames: int) -> torch.Tensor:
    return torch.randn(SHAPES[shape][0], frames, generator=torch.Generator().manual_seed(frames))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=SETS)
def instruction_set(request):
    """One that the machine has."""
    try:
        encoder("64", random_encoder("64", 1), variant=request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.mark.parametrize("format", ERRORS)
@pytest.mark.parametrize(
    ("shape", "frames"),
    [("64", 1), ("64", 34), ("64", 1030), ("384", 130), ("512", 35), ("odd", 141), ("128 bands", 256)],
)
def test_equals_the_formula(instruction_set, shape, frames, format):
    weights, features = random_encoder(shape, (frames + 1) // 2), sound(shape, frames)
    made = encoder(shape, weights, format, variant=instruction_set)
    assert made.instruction_set == instruction_set
    assert relative(made(features), reference(shape, weights, features)) < ERRORS[format]


@pytest.mark.parametrize("format", ERRORS)
def test_a_whole_window(format):
    weights, features = random_encoder("512", 1500), sound("512", 3000)
    assert (
        relative(encoder("512", weights, format)(features), reference("512", weights, features))
        < ERRORS[format]
    )


def test_no_layers_and_positions_in_the_output():
    weights, features = random_encoder("no layer", 9), sound("no layer", 14)
    found = encoder("no layer", weights, output_positions=True)(features)
    wanted = reference("no layer", weights, features) + weights["encoder.embed_positions"][:7]
    assert relative(found, wanted) < ERRORS["fp32"]


@pytest.mark.parametrize("format", ERRORS)
def test_bits_do_not_depend_on_threads_or_on_what_was_encoded_before(instruction_set, format):
    weights = random_encoder("64", 200)
    long, short = sound("64", 400), sound("64", 35)
    one, three = (encoder("64", weights, format, threads, variant=instruction_set) for threads in (1, 3))
    alone = one(short)
    for made in (three, one):
        assert torch.equal(made(long), one(long))
        assert torch.equal(made(short), alone)


def test_wide_instruction_sets_agree_to_the_bit_in_fp32():
    weights, features = random_encoder("odd", 100), sound("odd", 200)
    states = []
    for name in ("avx2", "avx512", "amx"):
        try:
            states.append(encoder("odd", weights, variant=name)(features))
        except ValueError:
            continue
    assert all(torch.equal(each, states[0]) for each in states)


def test_large_scores_and_large_activations_stay_finite():
    weights, features = random_encoder("64", 400), sound("64", 800)
    weights["encoder.layers.0.self_qkv.weight"] *= 100
    weights["encoder.layers.0.fc2.weight"][3] = 0
    weights["encoder.layers.1.self_norm.weight"] *= 1000
    wanted = reference("64", weights, features)
    assert relative(encoder("64", weights)(features), wanted) < 1e-3
    for format in ("bf16", "int8"):
        assert encoder("64", weights, format)(features).isfinite().all()


@pytest.mark.parametrize("format", ERRORS)
def test_scores_that_rise_from_block_to_block_of_keys(instruction_set, format):
    """What was summed up under a smaller largest score must be brought to the larger one."""
    weights, features = random_encoder("64", 515), sound("64", 1030)
    weights["encoder.embed_positions"] *= torch.linspace(0.2, 3, 515)[:, None]
    weights["encoder.layers.0.self_qkv.weight"] *= 2
    found = encoder("64", weights, format, variant=instruction_set)(features)
    assert relative(found, reference("64", weights, features)) < ERRORS[format]


def test_several_at_once():
    weights = random_encoder("64", 100)
    made = [encoder("64", weights, format, 2) for format in ERRORS]
    alone = [each(sound("64", 200)) for each in made]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: made[i % 3](sound("64", 200)), range(12)))
    assert all(torch.equal(each, alone[i % 3]) for i, each in enumerate(found))


def test_errors_name_the_argument():
    weights = random_encoder("64", 10)
    made = encoder("64", weights)
    for features, message in (
        (sound("64", 21), "features must have 1 to 20 frames, got 21"),
        (torch.zeros(80, 0), "features must have 1 to 20 frames, got 0"),
        (sound("odd", 4), r"features must have shape \[80, any\], got \[5, 4\]"),
        (torch.zeros(3), r"features must be \[mel bins, frames\], got \(3,\)"),
        (torch.full((80, 4), torch.nan), "features must be finite, got nan in band 0 of frame 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made(features)
    for change, message in (
        ({"format": "int4"}, "encoder_format must be one of fp32, bf16, int8, got 'int4'"),
        ({"threads": -1}, "threads must be"),
        (
            {"variant": "sse9"},
            "variant must be amx, avx512bf16, avx512vnni, avx512, avx2 or portable, got sse9",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            encoder("64", weights, **change)
    for name, tensor, message in (
        ("layers.1.fc2.bias", None, "encoder.layers.1.fc2.bias must be among the weights"),
        ("layers.0.fc1.weight", torch.zeros(8, 63), r"layers.0.fc1.weight must have shape \[any, 64\]"),
        ("conv2.weight", torch.full((64, 64, 3), torch.inf), "conv2.weight must be finite, got inf in row 0"),
        ("embed_positions", torch.zeros(10, 32), "embed_positions must have shape"),
    ):
        changed = weights | {f"encoder.{name}": tensor}
        with pytest.raises(ValueError, match=message):
            encoder("64", {each: value for each, value in changed.items() if value is not None})


class EncoderParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("format", c_int32),
        ("threads", c_int32),
        ("output_positions", c_int32),
        ("variant", c_char_p),
    )


def test_a_c_program(monkeypatch):
    """Whatever it hands over, a status and a text."""
    from kvspn import _native

    monkeypatch.delenv("KVSPN_CPU", raising=False)
    lib = library(_native.__file__)
    lib.kvspn_encoder_destroy.argtypes = [c_void_p]
    lib.kvspn_encoder_encode.argtypes = [c_void_p] * 3
    lib.kvspn_encoder_instruction_set.argtypes = [c_void_p]
    lib.kvspn_encoder_instruction_set.restype = c_char_p
    weights = {name: tensor.numpy() for name, tensor in random_encoder("64", 10).items()}
    tensors = (Tensor * len(weights))(*(Tensor.of(name, array) for name, array in weights.items()))

    def create(size=None, count=None, **fields):
        made = c_void_p()
        values = {"layers": 2, "heads": 1, "format": 1, "threads": 1} | fields
        return lib.kvspn_encoder_create(
            byref(EncoderParams(size or ctypes.sizeof(EncoderParams), **values)),
            tensors,
            count or len(weights),
            byref(made),
        ), made

    for fields, message in (
        ({"size": 8}, b"params->struct_size must be"),
        ({"layers": -1}, b"layers must be at least 0, got -1"),
        ({"layers": 3}, b"encoder.layers.2.self_norm.weight must be among the weights"),
        ({"heads": 0}, b"heads must be at least 1, got 0"),
        ({"heads": 5}, b"a multiple of 5 heads"),
        ({"format": 2}, b"format must be KVSPN_FP32, KVSPN_BF16 or KVSPN_INT8, got 2"),
        ({"threads": 1025}, b"threads must be 0 to 1024, got 1025"),
        ({"count": -1}, b"weights must be -1 tensors"),
    ):
        assert create(**fields)[0] == INVALID
        assert message in lib.kvspn_last_error()
    status, made = create(variant=b"portable")
    assert (status, lib.kvspn_encoder_instruction_set(made)) == (OK, b"portable")
    features = sound("64", 20).numpy()
    states = np.full((10, 128), np.nan, np.float32)
    rows = Tensor.of("states", states[:, :64])
    assert lib.kvspn_encoder_encode(made, byref(Tensor.of("features", features)), byref(rows)) == OK
    assert np.isfinite(states[:, :64]).all()
    assert np.isnan(states[:, 64:]).all()
    turned = np.asfortranarray(features)
    again = np.empty((10, 64), np.float32)
    given = byref(Tensor.of("features", turned)), byref(Tensor.of("states", again))
    assert lib.kvspn_encoder_encode(made, *given) == OK
    assert np.array_equal(again, states[:, :64])
    for arguments, message in (
        ((None, None), b"features must be given, got a null pointer"),
        ((given[0], byref(Tensor.of("states", again[:9]))), b"states must have shape [10, 64], got [9, 64]"),
        ((given[0], byref(Tensor.of("states", again.T.copy().T))), b"states must be contiguous in the last"),
        ((byref(Tensor.of("features", features.astype(np.int32))), given[1]), b"features must be fp32"),
    ):
        assert lib.kvspn_encoder_encode(made, *arguments) == INVALID
        assert message in lib.kvspn_last_error()
    assert lib.kvspn_encoder_encode(None, *given) == INVALID
    assert lib.kvspn_encoder_instruction_set(None) == b""
    lib.kvspn_encoder_destroy(made)
    lib.kvspn_encoder_destroy(None)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_translator_hears_the_same(tmp_path, backend):
    """fp32 gives torch's text, with the model's output positions and without timestamps."""
    folder = tiny.save_model(tmp_path, encoder_output_positions=True)
    torchs, ours = (Translator.from_folder(folder, backend, encoder_format=f) for f in (None, "fp32"))
    samples = tiny.sound(1)
    assert ours.translate(samples, "de", "en").tokens == torchs.translate(samples, "de", "en").tokens
    features = ours.windows.features(samples)
    states = ours.windows.encode(features)
    assert relative(states, torchs.windows.encode(features)) < ERRORS["fp32"]
    assert not torch.equal(
        states, Translator.from_folder(folder, encoder_format="bf16").windows.encode(features)
    )


def test_a_model_on_another_device_refuses(tmp_path):
    model, _ = open_model(str(tiny.save_model(tmp_path)), torch.float32)
    with pytest.raises(ValueError, match="encoder_format must be None on meta, got 'int8'"):
        model.to("meta").speech_encoder("int8")
