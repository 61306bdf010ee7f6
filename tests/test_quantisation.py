import copy

import pytest
import torch
from torch import nn

from kvspn.engines import engine
from kvspn.weights import Linear
from kvspn.weights.formats import FORMATS, quantise, round_to_int8
from kvspn.weights.linear import dequantise, quantise_linear
from kvspn.weights.random import random_decoder

WEIGHTS = {"layers": 4, "blocks": 2, "short_list": 12}


@pytest.mark.parametrize("to", FORMATS)
def test_every_tensor_is_converted(to):
    weights = random_decoder(**WEIGHTS)
    converted = quantise(weights, to)
    dtype = torch.bfloat16 if to in ("fp8", "int8", "int4") else FORMATS[to].dtype
    assert converted.embed_tokens.dtype == converted.norm.weight.dtype == dtype
    assert converted.head.weight.dtype == (torch.int8 if to == "int4" else FORMATS[to].dtype)
    assert torch.equal(converted.draft_ids, weights.draft_ids)
    for one, other in zip(
        (*weights.layers, *weights.blocks), (*converted.layers, *converted.blocks), strict=True
    ):
        assert type(one) is type(other)
        for before, after in zip(one, other, strict=True):
            assert type(before) is type(after)
            assert after.weight.dtype == (FORMATS[to].dtype if hasattr(after, "scale") else dtype)
    step(converted)


def step(weights):
    e = engine("reference", weights, batch=1, capacity=8, cross_capacity=4)
    e.start([torch.randn(3, 16)], [[1]], eos=-1, max_length=8)
    e.step()


@pytest.mark.parametrize("to", ["fp32", "fp8", "int8"])
@pytest.mark.parametrize("short_list", [0, 12])
def test_the_draft_network_in_a_format_of_its_own(to, short_list):
    weights = random_decoder(layers=4, blocks=2, short_list=short_list)
    converted = quantise(weights, f"{to}/int4")
    plain = quantise(weights, to)
    assert all(
        torch.equal(*pair)
        for pair in zip(converted.layers[0].fc1, plain.layers[0].fc1, strict=True)
        if pair[0] is not None
    )
    assert converted.blocks[0].fc1.weight.dtype == converted.draft_head.weight.dtype == torch.uint8
    assert converted.draft_head.weight.shape == (short_list or 29, 8)
    step(converted)


def test_int8_is_within_half_a_step():
    linear = random_decoder(ffn=64).layers[0].fc1
    quantised = quantise(random_decoder(ffn=64), "int8").layers[0].fc1
    error = (dequantise(quantised.weight, quantised.scale) - linear.weight).abs()
    assert (error <= 0.5001 * quantised.scale[:, None]).all()
    assert quantised.weight.abs().amax(dim=1).eq(127).all()
    assert torch.equal(quantised.bias, linear.bias)


def test_fp8_is_within_half_a_step():
    """Of three bits of mantissa, or of the subnormal values; a row of zeros stays one."""
    linear = random_decoder(ffn=64).layers[0].fc1
    linear.weight[3] = 0
    quantised = quantise_linear(linear, "fp8")
    assert quantised.weight.float().abs().amax(dim=1).unique().tolist() == [0, 448]
    error = (dequantise(quantised.weight, quantised.scale) - linear.weight).abs()
    subnormal = 2**-10 * quantised.scale[:, None]
    assert (error <= 1.0001 * torch.maximum(linear.weight.abs() / 16, subnormal)).all()
    assert torch.equal(quantised.bias, linear.bias)


def test_matrices_rounded_to_int8_lose_nothing_more():
    """Not even by way of fp16, in which a model is saved: the same integers, by nearly the same scales."""
    decoder = nn.Module()
    decoder.embed_tokens, decoder.embed_positions = nn.Embedding(24, 40), nn.Embedding(8, 40)
    decoder.layers = nn.ModuleList([nn.Linear(40, 24), nn.LayerNorm(24)])
    before = copy.deepcopy(decoder)
    rounded = round_to_int8(decoder)
    assert rounded[0] is decoder.embed_tokens.weight and rounded[1] is decoder.layers[0].weight
    assert len(rounded) == 2 and torch.equal(decoder.embed_positions.weight, before.embed_positions.weight)
    for matrix, old in zip(rounded, (before.embed_tokens, before.layers[0]), strict=True):
        first = quantise_linear(Linear(old.weight.detach()), "int8")
        assert torch.equal(matrix, dequantise(first.weight, first.scale))
        again = quantise_linear(Linear(matrix.detach().half()), "int8")
        assert torch.equal(again.weight, first.weight)
        torch.testing.assert_close(again.scale, first.scale, rtol=2**-11, atol=0)


def test_int4_is_within_half_a_step():
    """But for the value opposite a group's largest, which may be cut by one step: 8 becomes 7."""
    linear = random_decoder(ffn=320).layers[0].fc2
    quantised = quantise_linear(linear, "int4")
    assert quantised.scale.shape == (16, 5)
    error = (dequantise(quantised.weight, quantised.scale) - linear.weight).abs().unflatten(1, (5, 64))
    step = quantised.scale.abs()[..., None]
    steps = linear.weight.unflatten(1, (5, 64)) / quantised.scale[..., None]
    assert (error <= torch.where(steps > 7.5, 1.0001, 0.5001) * step).all()
    assert (steps.min(dim=2).values == -8).all()
    with pytest.raises(ValueError, match=r"^weight must have an even number of columns in int4, got 3"):
        quantise_linear(Linear(torch.ones(2, 3)), "int4")


def test_a_tied_head_stays_tied():
    converted = quantise(random_decoder(), "bf16")
    assert converted.head.weight.data_ptr() == converted.embed_tokens.data_ptr()


def test_errors():
    for name in ("int3", "int8/", "/int4", "int8/int3", "int8/int4/int4"):
        with pytest.raises(ValueError, match=r"^weights must be one of fp32, .* as base/draft, got '" + name):
            quantise(random_decoder(), name)
    with pytest.raises(
        ValueError, match=r"^weights must be fp32, bf16 or fp16 to be converted, got torch\.int8"
    ):
        quantise(random_decoder(quantised="int8"), "bf16")
