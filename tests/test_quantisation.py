import pytest
import torch

from kvspn.engines import engine
from kvspn.ops.fused_linear import dequantise
from kvspn.quantisation import FORMATS, quantise
from kvspn.random_decoder import random_decoder

WEIGHTS = {"layers": 4, "blocks": 2, "short_list": 12}


@pytest.mark.parametrize("to", FORMATS)
def test_every_tensor_is_converted(to):
    weights = random_decoder(**WEIGHTS)
    converted = quantise(weights, to)
    dtype = torch.bfloat16 if to == "int8" else FORMATS[to]
    assert converted.embed_tokens.dtype == converted.norm.weight.dtype == dtype
    assert torch.equal(converted.draft_ids, weights.draft_ids)
    for one, other in zip(
        (*weights.layers, *weights.blocks), (*converted.layers, *converted.blocks), strict=True
    ):
        assert type(one) is type(other)
        for before, after in zip(one, other, strict=True):
            assert type(before) is type(after)
            assert after.weight.dtype == (FORMATS[to] if hasattr(after, "scale") else dtype)
    e = engine("reference", converted, batch=1, capacity=8, cross_capacity=4)
    e.start([torch.randn(3, 16)], [[1]], eos=-1, max_length=8)
    e.step()


def test_int8_is_within_half_a_step():
    linear = random_decoder(ffn=64).layers[0].fc1
    quantised = quantise(random_decoder(ffn=64), "int8").layers[0].fc1
    error = (dequantise(quantised.weight, quantised.scale) - linear.weight).abs()
    assert (error <= 0.5001 * quantised.scale[:, None]).all()
    assert quantised.weight.abs().amax(dim=1).eq(127).all()
    assert torch.equal(quantised.bias, linear.bias)


def test_a_tied_head_stays_tied():
    converted = quantise(random_decoder(), "bf16")
    assert converted.head.weight.data_ptr() == converted.embed_tokens.data_ptr()


def test_errors():
    with pytest.raises(ValueError, match=r"^weights must be one of fp32, bf16, fp16, int8, got 'int3'"):
        quantise(random_decoder(), "int3")
    with pytest.raises(
        ValueError, match=r"^weights must be fp32, bf16 or fp16 to be converted, got torch\.int8"
    ):
        quantise(random_decoder(quantised=True), "bf16")
