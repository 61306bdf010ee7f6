"""Attention over a group of layers' caches as one sequence of keys: kvspn beside other ways.

One query (and two) over n = 4 layers, rows of different lengths, the same cache for every way. Each is
checked against the formula in float64: its error is at most twice that of the formula in the same dtype, and
eight roundings. What a way needs to know of the lengths (masks, page tables, plans) it makes once, untimed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conftest import foreign
from kvspn import ops

LAYERS = 4
BLOCK = 128  # FlexAttention's, of keys
LENGTHS = (64, 448, 1024, 4096)
ROWS = ((1, 1), (1, 2), (8, 1), (32, 1))  # batch, queries

Attend = Callable[[], Tensor]  # [B, Q, H * D]


def flattened(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """torch.ops.kvspn: the C++ kernel on the CPU; the plain reference on a GPU."""
    return lambda: ops.flat_kv_attention(q, kv, lengths, False)


def triton(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton brings it")
    from kvspn.triton_kernels import flat_kv_attention

    return lambda: flat_kv_attention(q, kv, lengths, False)


def concatenated(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """Copied into one sequence, up to the longest row, then torch's scaled_dot_product_attention."""
    longest = int(lengths.max())
    mask = None if len(q) == 1 else visible(lengths, longest).repeat(1, len(kv))[:, None, None]

    def attend() -> Tensor:
        keys, values = flat(kv[..., :longest, :])
        return joined(F.scaled_dot_product_attention(q, keys, values, mask))

    return attend


def layer_by_layer(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """A product of matrices for each layer, the results weighed by their softmax denominators."""
    longest = int(lengths.max())
    hidden = ~visible(lengths, longest)[:, None, None]

    def attend() -> Tensor:
        outs, denominators = [], []
        for keys, values in kv[..., :longest, :]:
            scores = (q @ keys.transpose(2, 3)).float() * q.shape[-1] ** -0.5
            scores = scores.masked_fill(hidden, -torch.inf)
            denominators.append(scores.logsumexp(-1))
            outs.append(scores.softmax(-1).to(q.dtype) @ values)
        return merged(outs, denominators)

    return attend


def flex(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """FlexAttention on the sequence copied together, compiled with the copy; skips blocks past a length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    capacity = kv.shape[4]

    def seen(b: Tensor, h: Tensor, i: Tensor, position: Tensor) -> Tensor:
        return position % capacity < lengths[b]

    def attend(q: Tensor, kv: Tensor, blocks: object) -> Tensor:
        keys, values = flat(kv)
        return joined(flex_attention(q, keys, values, block_mask=blocks))

    blocks = create_block_mask(seen, len(q), None, q.shape[2], len(kv) * capacity, device=q.device)
    compiled = compile(attend, q)
    return lambda: compiled(q, kv, blocks)


def flex_in_place(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """FlexAttention on each layer where it lies, merged, one compiled function."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, position: Tensor) -> Tensor:
        return position < lengths[b]

    def attend(q: Tensor, kv: Tensor, blocks: object) -> Tensor:
        outs, denominators = [], []
        for keys, values in (layer.unbind() for layer in kv.unbind()):
            out, aux = flex_attention(q, keys, values, block_mask=blocks, return_aux=AuxRequest(lse=True))
            outs.append(out)
            denominators.append(aux.lse)
        return merged(outs, denominators)

    blocks = create_block_mask(seen, len(q), None, q.shape[2], kv.shape[4], device=q.device)
    compiled = compile(attend, q)
    return lambda: compiled(q, kv, blocks)


def flashinfer(q: Tensor, kv: Tensor, lengths: Tensor) -> Attend:
    """FlashInfer's batch decode, the cache where it lies: pages of one position, queries as further heads."""
    reason = "flashinfer is not installed: pip install flashinfer-python brings it"
    module = pytest.importorskip("flashinfer", reason=reason)
    if q.device.type != "cuda":
        pytest.skip("flashinfer needs a GPU")
    _, _, _, heads, _, width = kv.shape
    first = torch.arange(len(kv), device=q.device) * (kv.stride(0) // width)
    tables = [
        (first[:, None] + b * (kv.stride(2) // width) + torch.arange(length, device=q.device)).flatten()
        for b, length in enumerate(lengths.tolist())
    ]
    ends = torch.tensor([0, *map(len, tables)]).cumsum(0).int()
    pages = torch.cat(tables).int()
    # keys, and values: [pages, H, 1, D], all of them in the same storage
    cache = tuple(
        part.as_strided((int(pages.max()) + 1, heads, 1, width), (width, kv.stride(3), width, 1))
        for part in kv.unbind(1)
    )
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 27, dtype=torch.uint8, device=q.device), "HND"
    )
    wrapper.plan(
        ends.to(q.device),
        pages,
        torch.ones(len(q), dtype=torch.int32, device=q.device),
        heads * q.shape[2],
        heads,
        width,
        1,
        q_data_type=q.dtype,
        kv_data_type=kv.dtype,
    )
    query = q.flatten(1, 2)  # [B, H * Q, D]: all queries of a head read its keys
    return lambda: joined(wrapper.run(query, cache).view(q.shape))


WAYS = {
    "kvspn": flattened,
    "kvspn triton": triton,
    "concatenated": concatenated,
    "layer by layer": layer_by_layer,
    "flex": flex,
    "flex in place": flex_in_place,
    "flashinfer": flashinfer,
}
COMPILED = {"flex", "flex in place"}  # some seconds each: at one query, batch 1 and the largest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The grid where it is timed, something tiny where it is tested."""
    sizes = [(20, 3, 2), (1, 1, 1)]
    if metafunc.config.getoption("benchmark_only"):
        sizes = [(length, *rows) for length in LENGTHS for rows in ROWS]
    cases = [
        (way, length, batch, queries)
        for length, batch, queries in sizes
        for way in WAYS
        if length < LENGTHS[0] or way not in COMPILED or (batch, queries) in (ROWS[0], ROWS[-1])
    ]
    metafunc.parametrize("way,length,batch,queries", cases)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention(timed, device, shape, dtype, way, length, batch, queries):
    if device == "cpu" and batch * length > LENGTHS[-1]:
        pytest.skip("too large for a CPU's memory and patience")
    if device == "cpu" and way == "kvspn triton":
        pytest.skip("the Triton kernels need a GPU")
    torch.manual_seed(0)
    torch.compiler.reset()
    capacity = (length // BLOCK + 1) * BLOCK
    sizes = (LAYERS, 2, batch, shape.heads, capacity, shape.head_dim)
    q = torch.randn(batch, shape.heads, queries, shape.head_dim, dtype=dtype, device=device)
    kv = torch.randn(sizes, dtype=dtype, device=device)
    ragged = [length - b * (length // 2) // batch for b in range(batch)]
    for b, valid in enumerate(ragged):
        kv[:, :, b, :, valid:] = 100  # a key too many would show
    lengths = torch.tensor(ragged, dtype=torch.int32, device=device)
    size = (2 * LAYERS * sum(ragged) * shape.width + 2 * q.numel()) * q.element_size()
    case = f"attention, {LAYERS} × {length:,} keys, batch {batch}, queries {queries}"
    if way.startswith("kvspn"):
        out = timed(WAYS[way](q, kv, lengths), size, case=case)
    else:
        with foreign(device):
            out = timed(WAYS[way](q, kv, lengths), size, case=case)

    for b, valid in enumerate(ragged):
        row = q[b], flat(kv[:, :, b : b + 1, :, :valid])[:, 0]
        exact, plain = formula(*(each.double() for each in row)), formula(*row)
        error, usual = ((each.double() - exact).abs().max() for each in (out[b], plain))
        assert error <= 2 * usual + 8 * torch.finfo(dtype).eps * exact.abs().max()


def formula(q: Tensor, kv: Tensor) -> Tensor:
    """[H, Q, D] on [2, H, S, D] -> [Q, H * D]."""
    weights = (q @ kv[0].transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ kv[1]).transpose(0, 1).flatten(1)


def flat(kv: Tensor) -> Tensor:
    """A copy of [n, 2, B, H, S, D] as [2, B, H, n * S, D]."""
    return kv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def visible(lengths: Tensor, longest: int) -> Tensor:
    """[B, longest]: whether a row sees a position."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def merged(outs: list[Tensor], denominators: list[Tensor]) -> Tensor:
    """n times [B, H, Q, D] and the logarithms of their softmax denominators [B, H, Q] -> [B, Q, H * D]."""
    weights = torch.stack(denominators).softmax(0)[..., None]
    return joined((torch.stack(outs) * weights).sum(0).to(outs[0].dtype))


def joined(out: Tensor) -> Tensor:
    """[B, H, Q, D] -> [B, Q, H * D]."""
    return out.transpose(1, 2).flatten(2)


def compile(function: Callable[..., Tensor], q: Tensor) -> Callable[..., Tensor]:
    """On a GPU; on a CPU the compiler takes longer than the whole test."""
    return torch.compile(function, fullgraph=True, dynamic=False) if q.is_cuda else function
