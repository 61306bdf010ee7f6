"""The ops, one call each, beside a plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import nbytes
from kvspn.ops import (
    accept_and_rollback,
    append_kv,
    compact_kv,
    flat_kv_attention,
    fused_linear,
    lm_head_verify,
)

QUERIES = 2  # the newest token and its draft


def ints(device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("use", ["self", "cross", "cross-model"])
def test_flat_kv_attention(timed, device, shape, dtype, use):
    causal = use == "self"
    layers = shape.layers // shape.groups if use == "cross-model" else 1
    length = shape.encoder_positions if use == "cross" else shape.length
    queries = 1 if use == "cross-model" else QUERIES
    capacity = length + QUERIES
    kv = torch.randn(layers, 2, 1, shape.heads, capacity, shape.head_dim, dtype=dtype, device=device)
    q = torch.randn(1, shape.heads, queries, shape.head_dim, dtype=dtype, device=device)
    seen = kv[..., : length + queries * causal, :]
    out = timed(lambda: flat_kv_attention(q, kv, ints(device, length), causal), nbytes(seen, q, q))

    keys, values = seen.double()[:, :, 0].permute(1, 2, 0, 3, 4).flatten(2, 3)
    mask = torch.ones(queries, keys.shape[1], dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(length)
    expected = F.scaled_dot_product_attention(q[0].double(), keys, values, mask)
    close(out[0], expected.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("weights", ["dtype", "int8", "int4"])
@pytest.mark.parametrize("layer", ["qkv", "fc1", "fc2"])
def test_fused_linear(timed, device, shape, dtype, layer, weights):
    d = shape.width
    n, k = {"qkv": (3 * d, d), "fc1": (shape.ffn, d), "fc2": (d, shape.ffn)}[layer]
    x = torch.randn(1, QUERIES, k, dtype=dtype, device=device)
    bias = torch.randn(n, dtype=dtype, device=device)
    norm = torch.rand(2, k, dtype=dtype, device=device) if layer != "fc2" else (None, None)
    residual = torch.randn(1, QUERIES, n, dtype=dtype, device=device) if layer == "fc2" else None
    weight, scale, dense = make_weight(n, k, dtype, device, weights)
    out = timed(
        lambda: fused_linear(x, weight, bias, *norm, gelu=layer == "fc1", residual=residual, scale=scale),
        nbytes(weight, scale, bias, x, residual) + n * QUERIES * x.element_size(),
    )

    y = x.double() if layer == "fc2" else F.layer_norm(x.double(), (k,), norm[0].double(), norm[1].double())
    y = F.linear(y, dense, bias.double())
    y = F.gelu(y) if layer == "fc1" else y
    close(out, y if residual is None else y + residual.double())


def make_weight(n: int, k: int, dtype, device, kind: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """A random weight [n, k] in a format, its scale, and its values in float64."""
    if kind == "dtype":
        weight = torch.randn(n, k, dtype=dtype, device=device) * k**-0.5
        return weight, None, weight.double()
    groups = 1 if kind == "int8" else k // 32
    scale = torch.full((n, groups), k**-0.5 / (64 if kind == "int8" else 4), device=device)
    if kind == "int8":
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return weight, scale[:, 0].clone(), weight * scale.double()
    values = torch.randint(-8, 8, (n, k), device=device)
    packed = ((values[:, ::2] + 8) | (values[:, 1::2] + 8) << 4).to(torch.uint8)
    return packed, scale, values * scale.double().repeat_interleave(32, dim=1)


def test_lm_head_verify(timed, device, shape, dtype):
    weight = torch.randn(shape.vocabulary, shape.width, dtype=dtype, device=device)
    x = torch.randn(1, QUERIES, shape.width, dtype=dtype, device=device)
    mask = torch.zeros(shape.vocabulary, device=device)
    mask[::7] = -torch.inf
    draft = ints(device, 5)[None]
    argmax, rank = timed(lambda: lm_head_verify(x, weight, draft, mask), nbytes(weight, x, mask))

    logits = F.linear(x.double(), weight.double()) + mask
    assert torch.equal(argmax.long(), logits.argmax(-1))
    assert int(rank) == int((logits[0, 0] > logits[0, 0, 5]).sum())


def test_append_kv(timed, device, shape, dtype):
    kv = torch.zeros(1, 2, 1, shape.heads, shape.length + QUERIES, shape.head_dim, dtype=dtype, device=device)
    new = torch.randn(2, 1, shape.heads, QUERIES, shape.head_dim, dtype=dtype, device=device)
    timed(lambda: append_kv(kv, *new, ints(device, shape.length), 0), 2 * nbytes(new))

    assert torch.equal(kv[0, :, :, :, shape.length :], new)
    assert not kv[..., : shape.length, :].any()


def test_compact_kv(timed, device, shape, dtype):
    sizes = (shape.layers, 2, 2, shape.heads, shape.length, shape.head_dim)
    before = torch.randn(*sizes, dtype=dtype, device=device)
    kv = before.clone()
    source = torch.arange(shape.length, dtype=torch.int32, device=device).expand(2, -1).contiguous()
    timed(
        lambda: compact_kv(kv, ints(device, 1, 0), source, ints(device, 0, 0)),
        2 * nbytes(kv),
        lambda: kv.copy_(before),
    )

    assert torch.equal(kv, before.flip(2))


@pytest.mark.parametrize("rank", [0, 1], ids=["accepted", "rejected"])
def test_accept_and_rollback(timed, device, shape, rank):
    length = shape.length
    tokens = torch.zeros(1, length + 4, dtype=torch.int32, device=device)
    lengths, finished = ints(device, length), torch.zeros(1, dtype=torch.bool, device=device)
    stats = torch.zeros(1, 3, dtype=torch.int32, device=device)
    draft, argmax, ranks = ints(device, 7)[None], ints(device, 8, 9)[None], ints(device, rank)[None]

    def reset() -> None:
        lengths.fill_(length)
        stats.zero_()

    timed(
        lambda: accept_and_rollback(
            tokens, lengths, finished, stats, draft, argmax, ranks, 1, -1, tokens.shape[1]
        ),
        nbytes(lengths, finished, stats, draft, argmax, ranks) * 2,
        reset,
    )

    emitted = [8] if rank else [7, 9]
    assert tokens[0, length + 1 :][: len(emitted)].tolist() == emitted
    assert int(lengths) == length + len(emitted)
    assert stats.tolist() == [[1, 1, 1 - rank]]
