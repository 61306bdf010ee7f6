import pytest
import torch

from kvspn.ops.append_kv import quantise

CASES = {
    # name: layers, batch, heads, query heads, queries, capacity, width, lengths, causal
    "self": (1, 3, 2, 2, 2, 9, 8, [0, 3, 7], True),
    "cross": (1, 2, 3, 3, 2, 11, 5, [11, 4], False),
    "group": (4, 3, 2, 2, 1, 6, 16, [1, 5, 6], False),
    "grouped queries": (2, 2, 2, 6, 3, 5, 4, [2, 5], False),
    "no keys": (3, 2, 1, 1, 2, 4, 4, [0, 2], False),
    "sixteen queries": (1, 1, 1, 1, 16, 33, 3, [17], True),
    "no queries": (1, 2, 1, 1, 0, 4, 4, [1, 2], True),
    "no rows": (1, 0, 1, 1, 2, 4, 4, [], True),
    "beyond the capacity": (1, 2, 1, 1, 2, 4, 4, [4, 9], True),
}


def make(case, dtype, tail=False):
    n, batch, heads, query_heads, queries, capacity, width, lengths, causal = CASES[case]
    buffer = torch.randn(n + 2, 2, batch + 1, heads, capacity + 3, width).to(dtype)
    kv = buffer[1 : n + 1, :, 1:, :, 2 : capacity + 2]
    q = torch.randn(batch, queries, query_heads, width).to(dtype).transpose(1, 2)
    arguments = {"q": q, "kv": kv, "lengths": torch.tensor(lengths, dtype=torch.int32), "causal": causal}
    if tail:
        arguments["tail"] = torch.randn(2, batch, heads, 3, width).to(dtype)
        arguments["tail_lengths"] = torch.arange(batch, dtype=torch.int32)
    return arguments


def make_int8(case, dtype):
    """An int8 cache in larger buffers, full of the wildest values past the lengths, and its scales of NaN."""
    arguments = make(case, dtype)
    values, scales = quantise(arguments["kv"])
    held = [
        torch.full((*x.shape[:4], x.shape[4] + 3, *x.shape[5:]), 1, dtype=x.dtype) for x in (values, scales)
    ]
    kv, kv_scale = (x[:, :, :, :, 1:-2] for x in held)
    kv.copy_(values), kv_scale.copy_(scales)
    for b, length in enumerate(arguments["lengths"].tolist()):
        end = length + arguments["causal"] * arguments["q"].shape[2]
        kv[:, :, b, :, end:], kv_scale[:, :, b, :, end:] = -128, torch.nan
    return arguments | {"kv": kv, "kv_scale": kv_scale}


def dequantised(arguments):
    """The same call on a cache of q's dtype, zeros past the lengths."""
    rest = dict(arguments)
    kv = rest["kv"].double() * rest.pop("kv_scale").double()[..., None]
    return rest | {"kv": kv.nan_to_num(0).to(rest["q"].dtype)}


def dense(q, kv, lengths, causal, scale=None, tail=None, tail_lengths=None):
    """The masked formula over the whole cache, in the inputs' dtype."""
    n, _, _, heads, capacity, width = kv.shape
    queries, repeat = q.shape[2], q.shape[1] // heads
    ends = lengths[:, None] + (torch.arange(queries) + 1 if causal else torch.zeros(queries))
    seen = (torch.arange(capacity) < ends[..., None]).repeat(1, 1, n)
    keys, values = kv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
    if tail is not None:
        keys, values = torch.cat([keys, tail[0]], 2), torch.cat([values, tail[1]], 2)
        seen_tail = torch.arange(tail.shape[3]) < tail_lengths[:, None, None]
        seen = torch.cat([seen, seen_tail.expand(-1, queries, -1)], 2)
    keys, values = (x.repeat_interleave(repeat, 1) for x in (keys, values))
    scores = q @ keys.transpose(2, 3) * (width**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ values).transpose(1, 2).flatten(2)


def to(arguments, dtype):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(ops, dtype, case, tail, assert_as_exact_as):
    arguments = make(case, dtype, tail)
    exact = dense(**to(arguments, torch.float64))
    assert_as_exact_as(ops.flat_kv_attention(**arguments), exact, dense(**arguments))


@pytest.mark.parametrize("case", CASES)
def test_int8_against_float64(ops, dtype, case, assert_as_exact_as):
    """Exactly what its values and scales say, and nothing past the lengths."""
    arguments = make_int8(case, dtype)
    exact = dense(**dequantised(to(arguments, torch.float64)))
    assert_as_exact_as(ops.flat_kv_attention(**arguments), exact, dense(**dequantised(arguments)))


def test_scale(ops, assert_as_exact_as):
    arguments = make("group", torch.float32) | {"scale": 0.3}
    exact = dense(**to(arguments, torch.float64))
    assert_as_exact_as(ops.flat_kv_attention(**arguments), exact, dense(**arguments))


@pytest.mark.parametrize("case", ["self", "cross", "group", "no keys"])
def test_what_lies_past_the_lengths_is_never_read(ops, dtype, case):
    arguments = make(case, dtype, tail=True)
    expected = ops.flat_kv_attention(**arguments)
    for b, length in enumerate(arguments["lengths"].tolist()):
        end = length + arguments["causal"] * arguments["q"].shape[2]
        arguments["kv"][:, :, b, :, end:] = torch.nan
        arguments["tail"][:, b, :, int(arguments["tail_lengths"][b]) :] = torch.nan
    actual = ops.flat_kv_attention(**arguments)
    assert torch.equal(actual, expected)
    assert not actual.isnan().any()


def test_a_query_without_keys_gives_zeros(ops, dtype):
    out = ops.flat_kv_attention(**make("no keys", dtype))
    assert not out[0].any()
    assert out[1].any()


@pytest.mark.parametrize("kv_format", ["float", "int8"])
@pytest.mark.parametrize("causal", [True, False])
def test_row_invariance(ops, dtype, causal, kv_format, set_threads):
    """Bit for bit: every row and query alone, with other threads, in another place in memory."""
    batch, heads, queries, capacity, width = 3, 2, 3, 70, 32
    kv, kv_scale = torch.randn(2, 2, batch, heads, capacity, width).to(dtype), None
    if kv_format == "int8":
        kv, kv_scale = quantise(kv)
    q = torch.randn(batch, heads, queries, width).to(dtype)
    lengths = torch.tensor([5, 66, 31], dtype=torch.int32)
    set_threads(1)
    together = ops.flat_kv_attention(q, kv, lengths, causal, kv_scale=kv_scale)
    for threads in (1, 2):
        set_threads(threads)
        assert torch.equal(ops.flat_kv_attention(q, kv, lengths, causal, kv_scale=kv_scale), together)
        for b in range(batch):
            row = slice(b, b + 1)
            scale = None if kv_scale is None else kv_scale[:, :, row].clone()
            for i in range(queries):
                alone = ops.flat_kv_attention(
                    q[row, :, i : i + 1],
                    kv[:, :, row].clone(),
                    lengths[row] + i * causal,
                    causal,
                    kv_scale=scale,
                )
                assert torch.equal(alone[0, 0], together[b, i])
