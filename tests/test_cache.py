import pytest
import torch

from kvspn.engines.cache import StepCache, draft_first
from kvspn.ops.append_kv import quantise


def make_cache(dtype=torch.float32, batch=3):
    cache = StepCache(4, batch, 2, 3, capacity=6, cross_capacity=5, dtype=dtype)
    cache.kv.normal_()
    cache.cross_kv.normal_()
    return cache


def addresses(cache):
    return [buffer.data_ptr() for buffer in (cache.kv, cache.lengths, cache.cross_kv, cache.cross_lengths)]


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_shapes(dtype):
    cache = make_cache(dtype)
    assert cache.kv.shape == (4, 2, 3, 2, 6, 3)
    assert cache.cross_kv.shape == (4, 2, 3, 2, 5, 3)
    assert cache.kv.is_contiguous()
    assert (cache.kv.dtype, cache.cross_kv.dtype) == (dtype, dtype)
    assert cache.lengths.tolist() == cache.cross_lengths.tolist() == [0, 0, 0]
    assert cache.nbytes == (4 * 2 * 3 * 2 * (6 + 5) * 3) * dtype.itemsize + 2 * 3 * 4


@pytest.mark.parametrize(("stride", "expected"), [(1, "01234"), (2, "02413"), (3, "03142"), (9, "01234")])
def test_draft_first(stride, expected):
    states = torch.arange(5.0)[:, None].expand(5, 2)
    assert draft_first(states, stride)[:, 0].tolist() == [float(place) for place in expected]


def test_a_group_is_a_view():
    cache = make_cache()
    group = cache.group(1, 2)
    assert torch.equal(group, cache.kv[2:4])
    assert group.data_ptr() == cache.kv[2].data_ptr()
    group.zero_()
    assert not cache.kv[2:].any()
    assert cache.kv[:2].all()


def test_rollback_moves_lengths_alone():
    cache = make_cache()
    cache.lengths.copy_(i32(2, 5, 6))
    kv, cross, before = cache.kv.clone(), cache.cross_kv.clone(), addresses(cache)
    cache.rollback(i32(1, 5, 0))
    assert cache.lengths.tolist() == [1, 5, 0]
    assert torch.equal(cache.kv, kv)
    assert torch.equal(cache.cross_kv, cross)
    assert addresses(cache) == before


def test_rollback_never_lengthens():
    cache = make_cache()
    cache.lengths.copy_(i32(2, 5, 6))
    cache.rollback(i32(4, -3, 6))
    assert cache.lengths.tolist() == [2, 0, 6]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_reorder(dtype, index_dtype):
    cache = make_cache(dtype)
    cache.lengths.copy_(i32(2, 5, 6))
    old, cross, before = cache.kv.clone(), cache.cross_kv.clone(), addresses(cache)
    cache.kv[:, :, 0, :, 2:] = torch.nan  # past its length: nobody may inherit it
    cache.reorder(torch.tensor([1, 0, 1], dtype=index_dtype))
    assert cache.lengths.tolist() == [5, 2, 5]
    assert torch.equal(cache.kv[:, :, 0, :, :5], old[:, :, 1, :, :5])
    assert torch.equal(cache.kv[:, :, 1, :, :2], old[:, :, 0, :, :2])
    assert torch.equal(cache.kv[:, :, 2, :, :5], old[:, :, 1, :, :5])
    assert not cache.kv[:, :, 1:].isnan().any()
    assert torch.equal(cache.cross_kv, cross)
    assert addresses(cache) == before


def test_cross_is_written_once():
    cache = make_cache()
    before, old = addresses(cache), cache.cross_kv.clone()
    kv = torch.randn(4, 2, 2, 3, 3)
    cache.write_cross(1, kv)
    assert torch.equal(cache.cross_kv[:, :, 1, :, :3], kv)
    old[:, :, 1, :, :3] = kv
    assert torch.equal(cache.cross_kv, old)
    assert cache.cross_lengths.tolist() == [0, 3, 0]
    with pytest.raises(ValueError, match=r"^row must not be written yet, got 1"):
        cache.write_cross(1, kv)
    cache.write_cross(0, kv)
    cache.reset()
    assert cache.cross_lengths.tolist() == [0, 0, 0]
    cache.write_cross(1, kv)
    assert addresses(cache) == before


def test_an_int8_cache():
    """Scales beside it: the encoder's are made on writing, and a reordering takes them along."""
    cache = StepCache(4, 3, 2, 3, capacity=6, cross_capacity=5, dtype=torch.int8)
    assert (cache.kv.dtype, cache.kv_scale.dtype) == (torch.int8, torch.float32)
    assert cache.kv_scale.shape == (4, 2, 3, 2, 6)
    assert cache.cross_kv_scale.shape == (4, 2, 3, 2, 5)
    assert cache.nbytes == (4 * 2 * 3 * 2 * (6 + 5)) * (3 + 4) + 2 * 3 * 4
    assert make_cache().kv_scale is None
    kv = torch.randn(4, 2, 2, 3, 3).bfloat16()
    cache.cross_kv_scale.fill_(torch.nan)
    cache.write_cross(1, kv)
    values, scale = quantise(kv)
    assert torch.equal(cache.cross_kv[:, :, 1, :, :3], values)
    assert torch.equal(cache.cross_kv_scale[:, :, 1, :, :3], scale)
    assert cache.cross_kv_scale[:, :, [0, 2]].isnan().all()
    cache.kv.random_(-127, 128)
    cache.kv_scale.normal_()
    cache.lengths.copy_(i32(2, 5, 6))
    old, old_scale = cache.kv.clone(), cache.kv_scale.clone()
    cache.reorder(i32(1, 0, 1))
    assert torch.equal(cache.kv[:, :, 0, :, :5], old[:, :, 1, :, :5])
    assert torch.equal(cache.kv_scale[:, :, 0, :, :5], old_scale[:, :, 1, :, :5])


def test_made_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        cache = make_cache()
    cache.kv.zero_()
    cache.reset()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("batch", lambda cache: StepCache(4, 0, 2, 3, 6, 5)),
        ("capacity", lambda cache: StepCache(4, 1, 2, 3, 2.5, 5)),
        ("dtype", lambda cache: StepCache(4, 1, 2, 3, 6, 5, torch.float64)),
        ("groups", lambda cache: cache.group(0, 3)),
        ("groups", lambda cache: cache.group(0, 0)),
        ("g", lambda cache: cache.group(2, 2)),
        ("row", lambda cache: cache.write_cross(3, torch.zeros(4, 2, 2, 3, 3))),
        ("kv", lambda cache: cache.write_cross(0, torch.zeros(4, 2, 2, 6, 3))),
        ("kv", lambda cache: cache.write_cross(0, torch.zeros(4, 2, 1, 3, 3))),
        ("kv", lambda cache: cache.write_cross(0, torch.zeros(4, 2, 2, 3, 3, dtype=torch.float16))),
        ("lengths", lambda cache: cache.rollback(i32(1, 2))),
        ("lengths", lambda cache: cache.rollback([1, 2, 3])),
        ("beam_index", lambda cache: cache.reorder(torch.zeros(3))),
        ("beam_index", lambda cache: cache.reorder(i32(0, 1, 3))),
    ],
)
def test_errors_name_the_argument(name, call):
    cache = make_cache()
    cache.lengths.copy_(i32(2, 5, 6))
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must .*, got "):
        call(cache)
    assert cache.lengths.tolist() == [2, 5, 6]
    assert cache.cross_lengths.tolist() == [0, 0, 0]
