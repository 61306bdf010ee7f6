import pytest
import torch
from torch.nn import functional as F


def pack_int4(values):
    """Integers -8 .. 7 [N, K] -> uint8 [N, K/2], low nibble first."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def formula(x, weight, bias=None, norm_weight=None, norm_bias=None, eps=1e-5, gelu=False, residual=None):
    """Plain PyTorch in one dtype throughout."""
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


def make(rows, n, k, dtype, parts):
    """Arguments with the named optional parts, x and residual strided."""
    full = {
        "x": torch.randn(*rows, 2 * k)[..., :k].to(dtype),
        "weight": torch.randn(n, k).to(dtype) / k**0.5,
        "bias": torch.randn(n).to(dtype),
        "norm_weight": 1 + torch.randn(k).to(dtype) / 4,
        "norm_bias": torch.randn(k).to(dtype) / 4,
        "residual": torch.randn(*rows, 2 * n)[..., :n].to(dtype),
    }
    names = ["x", "weight", *(part for part in parts.split() if part != "gelu")]
    return {name: full[name] for name in names} | {"gelu": "gelu" in parts}


PARTS = [
    "",
    "bias",
    "norm_weight",
    "norm_weight norm_bias bias",
    "bias gelu",
    "bias residual",
    "norm_weight norm_bias bias gelu residual",
]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [((1, 1), 5, 8), ((3, 2), 17, 33), ((16,), 8, 64), ((2, 0), 3, 4), ((0, 4), 3, 4), ((), 6, 3)],
)
def test_against_float64(ops, dtype, rows, n, k, parts, assert_as_exact_as):
    arguments = make(rows, n, k, dtype, parts)
    exact = formula(**{a: v.double() if isinstance(v, torch.Tensor) else v for a, v in arguments.items()})
    assert_as_exact_as(ops.fused_linear(**arguments), exact, formula(**arguments))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_in_another_dtype(ops, dtype, weight_dtype, assert_as_exact_as):
    x, weight = torch.randn(2, 24).to(dtype), torch.randn(7, 24).to(weight_dtype)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact_as(ops.fused_linear(x, weight), exact, F.linear(x, weight.to(dtype)))


def test_int8(ops, dtype, assert_as_exact_as):
    x = torch.randn(3, 10).to(dtype)
    values, scale = torch.randint(-128, 128, (6, 10)), torch.rand(6) / 50
    weight = values * scale[:, None]
    actual = ops.fused_linear(x, values.to(torch.int8), scale=scale)
    assert_as_exact_as(actual, F.linear(x.double(), weight.double()), F.linear(x, weight.to(dtype)))


def test_fp8(ops, dtype, assert_as_exact_as):
    x = torch.randn(3, 10).to(dtype)
    values, scale = torch.randn(6, 10).to(torch.float8_e4m3fn), torch.rand(6)
    weight = values.float() * scale[:, None]
    actual = ops.fused_linear(x, values, scale=scale)
    assert_as_exact_as(actual, F.linear(x.double(), weight.double()), F.linear(x, weight.to(dtype)))


@pytest.mark.parametrize("columns", [16, 19])
def test_every_value_of_fp8(ops, columns):
    """To the bit: subnormal ones, both zeros and NaN among them, in vectors and behind them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight, x = torch.zeros(256, columns).to(torch.float8_e4m3fn), torch.zeros(1, columns)
    for column in (0, columns - 1):
        weight[:, column], x[0, column] = every, 1
        actual = ops.fused_linear(x, weight, scale=torch.ones(256))
        torch.testing.assert_close(actual[0], every.float(), rtol=0, atol=0, equal_nan=True)
        weight[:, column], x[0, column] = torch.zeros(256).to(torch.float8_e4m3fn), 0


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_int4(ops, dtype, groups, assert_as_exact_as):
    x = torch.randn(3, 12).to(dtype)
    values, scale = torch.randint(-8, 8, (5, 12)), torch.rand(5, groups)
    weight = values * scale.repeat_interleave(12 // groups, dim=1)
    actual = ops.fused_linear(x, pack_int4(values), scale=scale)
    assert_as_exact_as(actual, F.linear(x.double(), weight.double()), F.linear(x, weight.to(dtype)))


@pytest.mark.parametrize("parts", ["bias", "norm_weight norm_bias bias gelu residual"])
@pytest.mark.parametrize(("n", "k"), [(192, 64), (37, 50), (3000, 32)])
def test_row_invariance(ops, dtype, n, k, parts, set_threads):
    """Bit for bit: every row alone, with other threads."""
    arguments = make((5, 3), n, k, dtype, parts)
    set_threads(1)
    together = ops.fused_linear(**arguments)
    for threads in (1, 2):
        set_threads(threads)
        assert torch.equal(ops.fused_linear(**arguments), together)
        for b in range(5):
            for i in range(3):
                alone = dict(arguments)
                for name in {"x", "residual"} & set(alone):
                    alone[name] = arguments[name][b, i].clone()
                assert torch.equal(ops.fused_linear(**alone), together[b, i])
