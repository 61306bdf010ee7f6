import pytest
import torch

from kvspn.ops.append_kv import quantise


def make_cache(dtype=torch.float32, layers=2, batch=3, heads=2, capacity=7, width=4):
    """A cache inside a larger buffer, so that its strides are not those of a fresh tensor."""
    buffer = torch.randn(layers + 1, 2, batch + 1, heads, capacity + 2, width).to(dtype)
    return buffer, buffer[1:, :, :batch, :, 1 : 1 + capacity]


@pytest.mark.parametrize("queries", [0, 1, 2, 3])
def test_whole_buffer(ops, dtype, queries):
    buffer, kv = make_cache(dtype)
    qkv = torch.randn(3, queries, 3, 2, 4).to(dtype).permute(2, 0, 3, 1, 4)
    k, v = qkv[1], qkv[2]  # strided, as fused projections are
    lengths = torch.tensor([0, 3, 4], dtype=torch.int32)
    expected = buffer.clone()
    for b, length in enumerate([0, 3, 4]):
        for i in range(queries):
            expected[2, 0, b, :, 1 + length + i] = k[b, :, i]
            expected[2, 1, b, :, 1 + length + i] = v[b, :, i]
    assert ops.append_kv(kv, k, v, lengths, 1) is None
    assert torch.equal(buffer, expected)
    assert lengths.tolist() == [0, 3, 4]


def test_positions_outside_are_dropped(ops):
    buffer, kv = make_cache()
    k, v = torch.randn(2, 3, 2, 3, 4)
    expected = buffer.clone()
    expected[1, 0, 0, :, 1 + 5 : 1 + 7], expected[1, 1, 0, :, 1 + 5 : 1 + 7] = k[0, :, :2], v[0, :, :2]
    expected[1, 0, 2, :, 1], expected[1, 1, 2, :, 1] = k[2, :, 2], v[2, :, 2]
    ops.append_kv(kv, k, v, torch.tensor([5, 7, -2], dtype=torch.int32), 0)
    assert torch.equal(buffer, expected)


def test_finished_rows_stay_untouched(ops):
    buffer, kv = make_cache()
    k, v = torch.randn(2, 3, 2, 1, 4)
    expected = buffer.clone()
    expected[1, 0, 1, :, 1 + 2], expected[1, 1, 1, :, 1 + 2] = k[1, :, 0], v[1, :, 0]
    lengths, finished = torch.full((3,), 2, dtype=torch.int32), torch.tensor([True, False, True])
    ops.append_kv(kv, k, v, lengths, 0, finished)
    assert torch.equal(buffer, expected)


def make_int8_cache():
    buffer, _ = make_cache()
    buffer, scales = torch.randint(-127, 128, buffer.shape, dtype=torch.int8), buffer[..., 0].clone()
    return buffer, buffer[1:, :, :3, :, 1:8], scales, scales[1:, :, :3, :, 1:8]


def test_an_int8_cache(ops, dtype):
    """Values, scales and the rest of the buffers, to the bit, with drops and a finished row."""
    buffer, kv, scales, kv_scale = make_int8_cache()
    k, v = torch.randn(2, 3, 2, 2, 4).to(dtype) * 10
    k[1, 0, 0] = 0
    expected, expected_scales = buffer.clone(), scales.clone()
    for b, i, position in ((0, 0, 6), (1, 0, 2), (1, 1, 3)):
        for part, x in enumerate((k, v)):
            at = (2, part, b, slice(None), 1 + position)
            expected[at], expected_scales[at] = quantise(x[b, :, i])
    lengths, finished = torch.tensor([6, 2, 3], dtype=torch.int32), torch.tensor([False, False, True])
    ops.append_kv(kv, k, v, lengths, 1, finished, kv_scale)
    assert torch.equal(buffer, expected)
    assert torch.equal(scales, expected_scales)


def test_quantisation(dtype):
    """The largest is 127, the rest to the nearest, halves to even; zeros stay, NaN and infinity show."""
    x = torch.tensor([[127, 2.5, 3.5, -2.5], [0, 0, 0, 0], [-254, 127, 2, 0]]).to(dtype)
    values, scale = quantise(x)
    assert values.tolist() == [[127, 2, 4, -2], [0, 0, 0, 0], [-127, 64, 1, 0]]
    assert scale.tolist() == [1, 0, 2]
    x = torch.randn(50, 33)
    values, scale = quantise(x)
    assert (values.abs().amax(-1) == 127).all()
    assert ((values * scale[:, None] - x).abs() <= 0.50001 * scale[:, None]).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        _, scale = quantise(torch.tensor([1.0, bad, 0.0]))
        assert not scale.isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_an_int8_cache(ops, bad):
    _, kv, _, kv_scale = make_int8_cache()
    k, v = torch.randn(2, 3, 2, 1, 4)
    k[0, 1, 0, 2] = bad
    ops.append_kv(kv, k, v, torch.zeros(3, dtype=torch.int32), 0, None, kv_scale)
    assert not (kv[0, 0, 0, 1, 0] * kv_scale[0, 0, 0, 1, 0]).isfinite().any()
    assert kv_scale[0, 0, 0, 0, 0].isfinite()
