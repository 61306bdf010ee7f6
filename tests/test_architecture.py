"""Decoders that are not made as Whisper's: RMSNorm, SwiGLU, RoPE, shared keys, no encoder; Qwen2's in all."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvspn.decoding.loop import decode
from kvspn.engines import backends, engine
from kvspn.models.qwen2 import qwen2_weights
from kvspn.weights import QWEN2, Architecture, Linear
from kvspn.weights.random import random_decoder

READY = [name for name, missing in backends().items() if missing is None and name != "cuda"]
OTHERS = [name for name in READY if name != "reference"]
TRAITS = {
    "rms_norm": Architecture(rms_norm=True),
    "norm_eps": Architecture(norm_eps=0.5),
    "gated": Architecture(gated=True),
    "rotary_base": Architecture(rotary_base=100.0),
    "no_cross": Architecture(cross=False),
    "key_heads": Architecture(cross=False, key_heads=1),
    "all": replace(QWEN2, key_heads=1, rotary_base=100.0),
}
PROMPTS = [[1, 2, 3], list(range(5, 23))]  # the second of more tokens than one chunk


@pytest.fixture(params=READY)
def backend(request):
    return request.param


def decoder(architecture=TRAITS["all"], **options):
    """Random weights, of a shape that every backend takes."""
    shape = {"heads": 2, "head_dim": 16, "ffn": 32, "positions": 32, "layers": 2, "blocks": 1, "gain": 2.0}
    return random_decoder(**(shape | options), architecture=architecture)


def decoded(backend, weights, prompts=PROMPTS, kv=None, **options):
    """Their tokens, and their log-probabilities."""
    encoded = 4 if weights.architecture.cross else 0
    e = engine(backend, weights, batch=len(prompts), capacity=24, cross_capacity=encoded, kv=kv)
    width = weights.embed_tokens.shape[1]
    states = [torch.linspace(-1, 1, 3 * width).view(3, width)] * len(prompts) if encoded else None
    usual = {"eos": -1, "max_length": [len(ids) + 6 for ids in prompts], "log_probs": True, "draft": False}
    return decode(e, states, prompts, **(usual | options))


def assert_same(found, expected, tolerance):
    assert found.sequences == expected.sequences
    for one, other in zip(found.log_probs, expected.log_probs, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("backend", OTHERS)
def test_each_trait_is_what_the_reference_says(backend, trait):
    weights = decoder(TRAITS[trait])
    assert_same(decoded(backend, weights), decoded("reference", weights), 1e-4)


@pytest.mark.skipif(
    not all(map(find_spec, ("triton", "kvspn.triton_kernels"))) or torch.cuda.is_available(),
    reason="needs triton, and no GPU",
)
def test_triton_takes_them_all(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weights, few = decoder(), {"prompts": [[1, 2, 3]], "max_length": 6, "draft": True, "k": "inf"}
    assert_same(decoded("triton", weights, **few), decoded("reference", weights, **few), 1e-4)


@pytest.mark.parametrize("backend", OTHERS)
def test_the_draft_network_guesses_what_the_reference_does(backend):
    """Every guess stands at k = inf, so that the tokens are half the draft network's."""
    weights = decoder(groups=1, draft_heads=4)
    found = decoded(backend, weights, draft=True, k="inf")
    assert_same(found, decoded("reference", weights, draft=True, k="inf"), 1e-4)
    assert found.sequences != decoded(backend, weights).sequences


@pytest.fixture(scope="module")
def qwen2():
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_qwen2_is_that_of_transformers(backend, qwen2):
    found = decoded(backend, qwen2_weights(qwen2))
    for ids, log_probs, prompt in zip(found.sequences, found.log_probs, PROMPTS, strict=True):
        with torch.no_grad():
            expected = qwen2(torch.tensor([ids])).logits[0].log_softmax(-1)
        generated = torch.tensor(ids[len(prompt) :])
        at = expected[len(prompt) - 1 : -1]
        assert at.argmax(-1).tolist() == generated.tolist()
        assert log_probs == pytest.approx(at.gather(1, generated[:, None])[:, 0].tolist(), abs=2e-4)


@pytest.mark.parametrize("setting", [{"hidden_act": "gelu"}, {"use_sliding_window": True}])
def test_qwen2_settings_that_are_not_honoured(qwen2, setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setattr(qwen2.config, name, value)
        with pytest.raises(ValueError, match=f"^{name} must be (silu|False), got {value}"):
            qwen2_weights(qwen2)


@pytest.mark.parametrize("kv", [None, "int8"])
def test_drafts_and_neighbours_change_no_bit(backend, kv):
    """By the draft network, by given drafts, and each row alone: what plain steps of all rows give."""
    weights = decoder(groups=1, draft_heads=4)
    plain = decoded(backend, weights, kv=kv)
    drafted = decoded(backend, weights, kv=kv, draft=True)
    assert_same(drafted, plain, 0)
    assert drafted.total.drafted
    guesses = [ids[len(prompt) : -2] for ids, prompt in zip(plain.sequences, PROMPTS, strict=True)]
    given = decoded(backend, weights, kv=kv, draft_tokens=guesses)
    assert_same(given, plain, 0)
    assert given.total.steps < plain.total.steps / 2
    for row, prompt in enumerate(PROMPTS):
        alone = decoded(backend, weights, [prompt], kv=kv)
        assert (alone.sequences[0], alone.log_probs[0]) == (plain.sequences[row], plain.log_probs[row])


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize("stored", ["fp32", "int8", "int4", "fp8"])
def test_every_format_on_every_instruction_set(variant, stored, monkeypatch):
    if backends()["native"] is not None:
        pytest.skip("the extension is not built")
    quantised = None if stored == "fp32" else stored
    weights = decoder(quantised=quantised)
    monkeypatch.setenv("KVSPN_CPU", variant)
    try:
        found = decoded("native", weights)
    except ValueError as error:
        pytest.skip(str(error))
    tolerance = 1e-4 if stored in ("fp32", "fp8") else 0.02  # Integer weights meet int16 activations.
    assert_same(found, decoded("reference", weights), tolerance)


def test_there_is_no_encoder():
    weights = decoder()
    for name in ("reference", "native"):
        with pytest.raises(ValueError, match=r"^cross_capacity must be 0 without cross-attention, got 4"):
            engine(name, weights, batch=1, capacity=8, cross_capacity=4)
        e = engine(name, weights, batch=1, capacity=8, cross_capacity=0)
        with pytest.raises(ValueError, match=r"^encoder_states must be None without cross-attention"):
            e.start([torch.zeros(2, 32)], [[1]], eos=-1, max_length=8)
        with pytest.raises(ValueError, match=r"^cross_queries must be False without cross-attention"):
            e.start(None, [[1]], eos=-1, max_length=8, cross_queries=True)


def of(weights, **changes):
    """What replaces the architecture."""
    return {"architecture": replace(weights.architecture, **changes)}


def first_layer(weights, **changes):
    return {"layers": (weights.layers[0]._replace(**changes),)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: of(w, key_heads=3), "key_heads must divide the 2 heads"),
        (lambda w: of(w, rms_norm=False), "layers[0].self_norm.bias must be a tensor, got NoneType"),
        (lambda w: of(w, gated=False), "layers[0].fc2.weight must have shape"),
        (lambda w: {"architecture": "qwen2"}, "architecture must be an Architecture, got str"),
        (lambda w: {"embed_positions": w.embed_tokens}, "embed_positions must be None with rotary_base"),
        (lambda w: {"norm": w.norm._replace(bias=w.norm.weight)}, "norm.bias must be None with rms_norm"),
        (
            lambda w: first_layer(w, fc1=Linear(w.layers[0].fc1.weight[:40])),
            "layers[0].fc1.weight must have a multiple of 32 rows with gated, got 40",
        ),
        (
            lambda w: first_layer(w, cross_norm=w.norm),
            "layers[0].cross_* must be None in an architecture without cross",
        ),
    ],
)
def test_weights_that_do_not_fit(change, message):
    weights = decoder(blocks=0)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        replace(weights, **change(weights))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"rotary_base": 0.5}, "rotary_base must be 0, or a number above 1, got 0.5"),
        ({"key_heads": 2}, "key_heads must be 0 with cross-attention, got 2"),
        ({"gated": 1}, "gated must be a bool, got int"),
    ],
)
def test_architectures_that_are_none(fields, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        Architecture(**fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key_heads": 3}, "key_heads must divide the 2 heads, got 3"),
        ({"key_heads": -1}, "key_heads must divide the 2 heads, got -1"),
        ({"cross": True}, "key_heads must be 0 or 2 with cross-attention, got 1"),
        ({"norm_eps": -1.0}, "norm_eps must be a positive number, got -1"),
        ({"rotary_base": 0.5}, "rotary_base must be 0 for none, or a number above 1, got 0.5"),
        ({"rotary_base": 0.0}, "embed_positions must be among the weights, got nothing"),
        ({"rms_norm": False}, "layers.0.self_norm.bias must be among the weights, got nothing"),
        ({"gated": False}, "layers.0.fc2.weight must have shape [32, 64], got [32, 32]"),
    ],
)
def test_the_library_checks_them_itself(changed, message):
    _native = pytest.importorskip("kvspn._native", reason="the extension is not built")
    from kvspn.weights.decoder import named_tensors

    weights = decoder(blocks=0)
    sizes = {"layers": 2, "heads": 2, "blocks": 0, "groups": 0, "last_layer_only": False, "threads": 1}
    traits = {"key_heads": 1, "rms_norm": True, "norm_eps": 1e-6, "gated": True, "rotary_base": 100.0}
    traits |= {"cross": False} | changed
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _native.Engine(dict(named_tensors(weights)), **sizes, **traits)


@pytest.mark.parametrize("trait", [name for name in TRAITS if name != "all"])
def test_cuda_refuses_them_by_name(trait):
    if backends()["cuda"] is not None:
        pytest.skip(f"cuda: {backends()['cuda']}")
    with pytest.raises(ValueError, match=f"^{trait} must be 0 on a CUDA device"):
        engine("cuda", decoder(TRAITS[trait]), batch=1, capacity=8, cross_capacity=4 * TRAITS[trait].cross)
