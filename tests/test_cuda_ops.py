"""The CUDA kernels of single ops on the host: what the ops' own tests, which run on them too, do not ask."""

import pytest
import torch
from test_ops_contract import BAD, int8_sample, sample
from test_ops_fused_linear import pack_int4

from kvspn import ops
from kvspn.ops.append_kv import quantise
from support import emulated

pytestmark = pytest.mark.skipif(
    not emulated.OPS_PATH.exists() or torch.cuda.is_available(),
    reason="not built: KVSPN_CUDA=emulate python setup.py build_ext",
)


@pytest.fixture
def configure():
    """configure(seed=...): a setting of the emulation; undone afterwards."""
    settings = {name: emulated.setting(name, emulated.OPS_PATH) for name in emulated.SETTINGS}
    before = {name: setting.value for name, setting in settings.items()}

    def apply(**values: int) -> None:
        for name, value in (before | values).items():
            settings[name].value = value

    yield apply
    apply()


def kernel(op):
    return getattr(torch.ops.kvspn_emulated, op)


def weights(kind, n, k):
    """weight and scale, whose rows are aligned to 16 bytes."""
    if kind == "int8":
        return torch.randint(-128, 128, (n, k)).to(torch.int8), torch.rand(n)
    if kind == "float8_e4m3fn":
        return torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(n)
    if kind == "int4":
        return pack_int4(torch.randint(-8, 8, (n, k))), torch.rand(n, k // 32)
    return torch.randn(n, k).to(getattr(torch, kind)), None


def shifted(tensor):
    """The same values at an address that is no multiple of 16 bytes."""
    buffer = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
    buffer[..., 1:] = tensor
    return buffer[..., 1:]


SETTINGS = ({"seed": 1}, {"multiprocessors": 1}, {"multiprocessors": 5, "shared_bytes": 20 << 10})


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4"])
def test_one_result_for_every_device_and_address(configure, kind, dtype):
    """Bit for bit: the order of threads, the device's size, the alignment and the rows of a launch."""
    x, (weight, scale) = torch.randn(21, 192).to(dtype), weights(kind, 23, 192)
    norm = {"norm_weight": torch.rand(192), "norm_bias": torch.rand(192)}
    draft = torch.randint(0, 23, (7, 2), dtype=torch.int32)
    expected = kernel("fused_linear")(x, weight, scale=scale, **norm)
    judged = kernel("lm_head_verify")(x.view(7, 3, 192), weight, draft, scale=scale, **norm)
    torch.testing.assert_close(
        expected, ops.fused_linear(x, weight, scale=scale, **norm), atol=1e-4, rtol=2e-2
    )
    given = ((x, shifted(weight)), (shifted(x), weight), (shifted(x), shifted(weight)))
    for setting, (rows, matrix) in zip(SETTINGS, given, strict=True):
        configure(**setting)
        assert torch.equal(kernel("fused_linear")(rows, matrix, scale=scale, **norm), expected)
        assert torch.equal(kernel("fused_linear")(x[19:], weight, scale=scale, **norm), expected[19:])
        again = kernel("lm_head_verify")(x.view(7, 3, 192), shifted(weight), draft, scale=scale, **norm)
        assert all(map(torch.equal, again, judged))


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_one_for_every_device_and_address(configure, dtype, causal, int8):
    """And whether the 18 queries come in one call, which takes several launches, or one by one."""
    layers, heads, capacity, width = 2, 1, 50, 64
    kv = torch.randn(layers, 2, 2, heads, capacity, width).to(dtype)
    tail = torch.randn(2, 2, heads, 17, width).to(dtype)
    q = torch.randn(2, 2 * heads, 18, width).to(dtype)
    lengths, rest = torch.tensor([33, 40]).int(), (None, tail, torch.tensor([17, 0]).int(), None)
    if int8:
        kv, kv_scale = quantise(kv)
        rest = None, None, None, kv_scale
    shifted_kv = torch.zeros(kv.numel() + 1, dtype=kv.dtype)[1:].view(kv.shape).copy_(kv)
    expected = kernel("flat_kv_attention")(q, kv, lengths, causal, *rest)
    torch.testing.assert_close(expected, ops.flat_kv_attention(q, kv, lengths, causal, *rest))
    for setting, cache in zip(SETTINGS, (kv, shifted_kv, kv), strict=True):
        configure(**setting)
        assert torch.equal(kernel("flat_kv_attention")(q, cache, lengths, causal, *rest), expected)
    for i in (0, 1, 17):
        one = kernel("flat_kv_attention")(q[:, :, i : i + 1], kv, lengths + i * causal, causal, *rest)
        assert torch.equal(one[:, 0], expected[:, i])


@pytest.mark.parametrize("width", [40, 64, 512])
def test_int8_is_one_for_every_device_and_address(configure, dtype, width):
    """What append_kv writes, to the bit, whatever the lanes of a position and the loads of its columns."""
    k, v = torch.randn(2, 3, 2, 5, width).to(dtype)
    lengths = torch.tensor([0, 3, 1], dtype=torch.int32)
    kv, kv_scale = torch.zeros(1, 2, 3, 2, 7, width, dtype=torch.int8), torch.zeros(1, 2, 3, 2, 7)
    expected, scales = kv.clone(), kv_scale.clone()
    ops.append_kv(expected, k, v, lengths, 0, None, scales)
    for setting, given in zip(SETTINGS, ((k, v), (shifted(k), v), (k, shifted(v))), strict=True):
        configure(**setting)
        for cache in (kv.clone(), shifted(kv)):
            kernel("append_kv")(cache, *given, lengths, 0, None, kv_scale.zero_())
            assert torch.equal(cache, expected)
            assert torch.equal(kv_scale, scales)


@pytest.mark.parametrize("length", [-(2**31), -3, 2**31 - 1])
def test_absurd_lengths(length):
    lengths = torch.full((3,), length, dtype=torch.int32)
    attention, append = sample("flat_kv_attention"), sample("append_kv")
    for name in ("lengths", "tail_lengths"):
        attention[name] = lengths
    expected = ops.flat_kv_attention(**attention)
    torch.testing.assert_close(kernel("flat_kv_attention")(**attention), expected)
    before = append["kv"].clone()
    kernel("append_kv")(**append | {"lengths": lengths})
    assert torch.equal(append["kv"], before)
    step = sample("accept_and_rollback") | {"lengths": lengths}
    if length > 0:
        before = step["tokens"].clone()
        kernel("accept_and_rollback")(**step)
        assert torch.equal(step["tokens"], before)
        assert step["finished"].all()


def test_nan_shows():
    """A key or a value that is read and not a number spoils its query, and no other."""
    arguments = sample("flat_kv_attention") | {"causal": False, "lengths": torch.tensor([3, 6, 0]).int()}
    for part in (0, 1):
        kv = arguments["kv"].clone()
        kv[1, part, 0, 0, 2] = torch.nan
        out = kernel("flat_kv_attention")(**arguments | {"kv": kv})
        assert out[0, :, :4].isnan().all()
        assert not out[1:].isnan().any()


@pytest.mark.parametrize("op", emulated.OPS)
def test_opcheck(op):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(kernel(op).default, (), sample(op, dtype))
    if (arguments := int8_sample(op)) is not None:
        torch.library.opcheck(kernel(op).default, (), arguments)


# The schema takes 2 for True, and True for 1.
DIRECT = [case for case in BAD if case[0] in emulated.OPS and case[2] not in ({"causal": 2}, {"layer": True})]


@pytest.mark.parametrize(
    ("op", "name", "wrong"), DIRECT, ids=lambda part: part if isinstance(part, str) else ""
)
def test_the_kernels_refuse_for_themselves(op, name, wrong):
    """Where torch.ops is called directly, they or the schema do."""
    arguments = sample(op) | wrong
    tensors = {a: v for a, v in arguments.items() if isinstance(v, torch.Tensor)}
    before = {a: v.clone() for a, v in tensors.items()}
    words = rf"\b{name}\b.* must .*, got |for argument '{name}'"
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        kernel(op)(**arguments)
    assert all(torch.equal(tensors[a], v) for a, v in before.items() if not v.is_meta)


def test_what_does_not_fit_a_device_is_refused(configure):
    x, weight = torch.zeros(1, 9000), torch.zeros(2, 9000)
    configure(shared_bytes=20 << 10)
    with pytest.raises(RuntimeError, match=r"x must be at most \d+ columns wide on this device, got 9000"):
        kernel("fused_linear")(x, weight)
    wide = sample("flat_kv_attention") | {
        "kv": torch.zeros(2, 2, 3, 2, 6, 200),
        "q": torch.zeros(3, 2, 2, 200),
    }
    with pytest.raises(RuntimeError, match=r"kv must have heads of at most 512 bytes, got 800"):
        kernel("flat_kv_attention")(**wide | {"tail": None, "tail_lengths": None})
    kv, kv_scale = torch.zeros(1, 2, 1, 1, 2, 513, dtype=torch.int8), torch.zeros(1, 2, 1, 1, 2)
    new = torch.zeros(1, 1, 1, 513)
    with pytest.raises(RuntimeError, match=r"kv must have heads of at most 512 bytes, got 513"):
        kernel("append_kv")(kv, new, new, torch.zeros(1, dtype=torch.int32), 0, None, kv_scale)


@pytest.mark.parametrize("op", emulated.OPS)
def test_errors_of_the_device_name_the_kernel(configure, op):
    configure(failing_launch=0)
    with pytest.raises(RuntimeError, match=rf"{op}: unspecified launch failure"):
        kernel(op)(**sample(op))
