import torch


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def make_cache(dtype=torch.float32):
    buffer = torch.randn(3, 2, 4, 2, 9, 3).to(dtype)
    return buffer, buffer[1:, :, :3, :, 1:8]  # layers 2, batch 3, capacity 7


def test_tree_with_overlap(ops, dtype):
    """Accepted nodes move to the front; a target may be another move's source."""
    buffer, kv = make_cache(dtype)
    expected, old = buffer.clone(), kv.clone()
    view = expected[1:, :, :3, :, 1:8]
    view[:, :, 0, :, [2, 3, 4]] = old[:, :, 0, :, [3, 5, 6]]
    view[:, :, 1, :, [0, 1]] = old[:, :, 1, :, [1, 0]]  # a swap
    ops.compact_kv(kv, i32([0, 1, 2]), i32([[3, 5, 6], [1, 0, -1], [-1, -1, -1]]), i32([2, 0, 4]))
    assert torch.equal(buffer, expected)


def test_beams(ops, dtype):
    """Rows take their parents' positions; a parent may be overwritten in the same call."""
    buffer, kv = make_cache(dtype)
    expected, old = buffer.clone(), kv.clone()
    view = expected[1:, :, :3, :, 1:8]
    view[:, :, 0, :, :4], view[:, :, 1, :, :4], view[:, :, 2, :, :2] = (
        old[:, :, 1, :, :4],
        old[:, :, 0, :, :4],
        old[:, :, 0, :, :2],
    )
    source = i32([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]])
    ops.compact_kv(kv, i32([1, 0, 0]), source, i32([0, 0, 0]))
    assert torch.equal(buffer, expected)


def test_moves_outside_are_left_out(ops):
    buffer, kv = make_cache()
    expected, old = buffer.clone(), kv.clone()
    view = expected[1:, :, :3, :, 1:8]
    view[:, :, 0, :, 6], view[:, :, 1, :, 0] = old[:, :, 0, :, 0], old[:, :, 1, :, 6]
    # row 0 ends past the capacity; row 1 starts before 0, from past it; row 2 has no such parent
    ops.compact_kv(kv, i32([0, 1, 3]), i32([[0, 1], [7, 6], [0, 1]]), i32([6, -1, 0]))
    assert torch.equal(buffer, expected)


def test_nothing_to_move(ops):
    buffer, kv = make_cache()
    expected = buffer.clone()
    ops.compact_kv(kv, i32([0, 1, 2]), torch.zeros(3, 0, dtype=torch.int32), i32([0, 0, 0]))
    assert torch.equal(buffer, expected)


def test_scales_move_with_an_int8_cache(ops):
    buffer, _ = make_cache()
    scales = buffer[..., 0].clone()
    buffer = torch.randint(-127, 128, buffer.shape, dtype=torch.int8)
    expected, expected_scales = buffer.clone(), scales.clone()
    for changed, old in ((expected, buffer), (expected_scales, scales)):
        view, old = changed[1:, :, :3, :, 1:8], old[1:, :, :3, :, 1:8].clone()
        view[:, :, 0, :, [2, 3]], view[:, :, 1, :, [0, 1]] = old[:, :, 2, :, [3, 5]], old[:, :, 1, :, [1, 0]]
    kv, kv_scale = buffer[1:, :, :3, :, 1:8], scales[1:, :, :3, :, 1:8]
    ops.compact_kv(kv, i32([2, 1, 2]), i32([[3, 5], [1, 0], [-1, -1]]), i32([2, 0, 4]), kv_scale)
    assert torch.equal(buffer, expected)
    assert torch.equal(scales, expected_scales)
