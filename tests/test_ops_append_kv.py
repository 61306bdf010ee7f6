import pytest
import torch


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
