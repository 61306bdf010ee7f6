"""The ops, one call each, timed in the frame of the steps: the package's kernels, and anyone's beside them.

from kvspn.measure.ops import run
run({"mine": SimpleNamespace(flat_kv_attention=my_kernel)}, ops=["flat_kv_attention"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kvspn.ops
from kvspn.engines import backends
from kvspn.measure.shapes import SHAPES, Shape
from kvspn.measure.timing import Case, Rounds, clock, counts, warnings
from kvspn.weights import Linear
from kvspn.weights.formats import FORMATS
from kvspn.weights.linear import dequantise, quantise_linear

QUERIES = 2  # the newest token and its draft


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op on random values.

    rows: query rows of each row of the batch.
    kv_length: keys of a layer that the first query sees, and positions in the cache.
    bytes, flops: that it must at least read and write, and compute.
    run: calls an implementation, which has the op's signature.
    correct: whether what that returned, or wrote, is right: as exact as the plain formula in the same dtype.
    reset: to be called before each run.
    """

    rows: int
    kv_length: int
    bytes: int
    flops: int
    run: Callable[[Callable[..., Any]], Any]
    correct: Callable[[Any], bool]
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Sizes:
    """A decoder's shape, a weight format (activations are bf16 beside integers), rows, and the device."""

    shape: Shape
    weights: str
    batch: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[FORMATS[self.weights].floats].dtype

    def randn(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=self.device) * scale).to(self.dtype)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def rows(self, value: int) -> Tensor:
        return self.ints(*[value] * self.batch)

    def matrix(self, n: int, k: int) -> Linear:
        dense = Linear(self.randn(n, k, scale=k**-0.5))
        return dense if FORMATS[self.weights].quantise is None else quantise_linear(dense, self.weights)

    def kv(self, layers: int, capacity: int) -> Tensor:
        return self.randn(layers, 2, self.batch, self.shape.heads, capacity, self.shape.head_dim)


def _as_exact(actual: Tensor, formula: Callable[[torch.dtype], Tensor], computed: torch.dtype) -> bool:
    """Whether the error against float64 is within what the formula has in a dtype: see _tolerance."""
    if actual.shape != (exact := formula(torch.float64)).shape:
        return False
    return bool((actual.double() - exact).abs().max() <= _tolerance(formula, computed, actual.dtype))


def _tolerance(
    formula: Callable[[torch.dtype], Tensor], computed: torch.dtype, rounded: torch.dtype
) -> float:
    exact = formula(torch.float64)
    error = (formula(computed).to(rounded).double() - exact).abs().max()
    return float(2 * error + 4 * torch.finfo(rounded).eps * exact[exact.isfinite()].abs().max())


def _attention(sizes: Sizes, layers: int, length: int, queries: int, causal: bool) -> Call:
    kv = sizes.kv(layers, length + QUERIES)
    q = sizes.randn(sizes.batch, sizes.shape.heads, queries, sizes.shape.head_dim)
    lengths = sizes.rows(length)
    seen = kv[..., : length + queries * causal, :]
    mask = torch.ones(queries, layers * seen.shape[4], dtype=torch.bool, device=sizes.device)
    mask = mask.tril(length) if causal else mask

    def formula(dtype: torch.dtype) -> Tensor:
        keys, values = seen.to(dtype).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return F.scaled_dot_product_attention(q.to(dtype), keys, values, mask).transpose(1, 2).flatten(2)

    return Call(
        queries,
        length,
        seen.numel() * seen.element_size() + 2 * q.nbytes,
        4 * q.numel() * mask.shape[1],
        lambda op: op(q, kv, lengths, causal),
        lambda out: _as_exact(out, formula, sizes.dtype),
    )


def _linear(sizes: Sizes, n: int, k: int, norm: bool, gelu: bool, residual: bool) -> Call:
    x = sizes.randn(sizes.batch, QUERIES, k)
    weight, _, scale = sizes.matrix(n, k)
    bias = sizes.randn(n)
    gain, shift = (1 + sizes.randn(k, scale=0.1), sizes.randn(k, scale=0.1)) if norm else (None, None)
    added = sizes.randn(sizes.batch, QUERIES, n) if residual else None

    def formula(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype)
        if gain is not None and shift is not None:
            y = F.layer_norm(y, (k,), gain.to(dtype), shift.to(dtype))
        y = F.linear(y, dequantise(weight, scale).to(dtype), bias.to(dtype))
        y = F.gelu(y) if gelu else y
        return y if added is None else y + added.to(dtype)

    tensors = (weight, scale, bias, gain, shift, x, added)
    read = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    rows = sizes.batch * QUERIES
    return Call(
        QUERIES,
        sizes.shape.length,
        read + rows * n * x.element_size(),
        2 * rows * n * k,
        lambda op: op(x, weight, bias, gain, shift, gelu=gelu, residual=added, scale=scale),
        lambda out: _as_exact(out, formula, sizes.dtype if scale is None else torch.float32),
    )


def _head(sizes: Sizes) -> Call:
    shape = sizes.shape
    x = sizes.randn(sizes.batch, QUERIES, shape.width)
    weight, _, scale = sizes.matrix(shape.vocabulary, shape.width)
    mask = torch.zeros(shape.vocabulary, device=sizes.device)
    mask[::7] = -torch.inf
    draft = sizes.rows(5)[:, None]

    def formula(dtype: torch.dtype) -> Tensor:
        return F.linear(x.to(dtype), dequantise(weight, scale).to(dtype)) + mask.to(dtype)

    def correct(found: tuple[Tensor, Tensor]) -> bool:
        """Logits that are equal up to rounding may change places."""
        argmax, rank = found
        logits = formula(torch.float64)
        slack = _tolerance(
            lambda dtype: formula(dtype).nan_to_num(neginf=0.0),
            sizes.dtype if scale is None else torch.float32,
            torch.float32,
        )
        chosen = logits.gather(2, argmax[..., None].long())[..., 0]
        first, own = logits[:, 0], logits[:, 0, 5, None]
        low, high = ((first > own + side).sum(1) for side in (slack, -slack))
        best = chosen >= logits.amax(-1) - slack
        return bool(best.all() and ((low <= rank[:, 0]) & (rank[:, 0] <= high)).all())

    scales = 0 if scale is None else scale.nbytes
    return Call(
        QUERIES,
        shape.length,
        weight.nbytes + scales + x.nbytes + mask.nbytes,
        2 * sizes.batch * QUERIES * shape.vocabulary * shape.width,
        lambda op: op(x, weight, draft, mask, scale),
        correct,
    )


def _append(sizes: Sizes) -> Call:
    length = sizes.shape.length
    before = sizes.kv(1, length + QUERIES)
    kv = before.clone()
    new = sizes.randn(2, sizes.batch, sizes.shape.heads, QUERIES, sizes.shape.head_dim)
    lengths = sizes.rows(length)
    after = torch.cat([before[..., :length, :], new[None]], dim=4)
    return Call(
        QUERIES,
        length,
        2 * new.nbytes,
        0,
        lambda op: op(kv, *new, lengths, 0),
        lambda out: torch.equal(kv, after),
        lambda: kv.copy_(before),
    )


def _compact(sizes: Sizes) -> Call:
    """Rows and positions, each the other way round."""
    length = sizes.shape.length
    before = sizes.kv(sizes.shape.layers, length)
    kv = before.clone()
    rows = sizes.ints(*reversed(range(sizes.batch)))
    source = sizes.ints(*reversed(range(length))).repeat(sizes.batch, 1)
    return Call(
        QUERIES,
        length,
        2 * kv.nbytes,
        0,
        lambda op: op(kv, rows, source, sizes.rows(0)),
        lambda out: torch.equal(kv, before.flip(2, 4)),
        lambda: kv.copy_(before),
    )


def _accept(sizes: Sizes, rank: int) -> Call:
    length, batch = sizes.shape.length, sizes.batch
    emitted = [8] if rank else [7, 9]
    tokens = torch.zeros(batch, length + 4, dtype=torch.int32, device=sizes.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=sizes.device)
    stats = torch.zeros(batch, 3, dtype=torch.int32, device=sizes.device)
    lengths = sizes.rows(length)
    draft, ranks = sizes.rows(7)[:, None], sizes.rows(rank)[:, None]
    argmax = sizes.ints(8, 9).repeat(batch, 1)

    def reset() -> None:
        lengths.fill_(length)
        stats.zero_()

    def correct(out: object) -> bool:
        return (
            tokens[:, length + 1 :][:, : len(emitted)].tolist() == [emitted] * batch
            and lengths.tolist() == [length + len(emitted)] * batch
            and stats.tolist() == [[1, 1, 1 - rank]] * batch
        )

    return Call(
        QUERIES,
        length,
        2 * sum(tensor.nbytes for tensor in (lengths, finished, stats, draft, argmax, ranks)),
        0,
        lambda op: op(tokens, lengths, finished, stats, draft, argmax, ranks, 1, -1, tokens.shape[1]),
        correct,
        reset,
    )


CALLS: dict[str, Callable[[Sizes], Call]] = {
    "flat_kv_attention/self": lambda sizes: _attention(sizes, 1, sizes.shape.length, QUERIES, True),
    "flat_kv_attention/cross": lambda sizes: _attention(
        sizes, 1, sizes.shape.encoder_positions, QUERIES, False
    ),
    "flat_kv_attention/cross-model": lambda sizes: _attention(
        sizes, sizes.shape.layers // sizes.shape.groups, sizes.shape.length, 1, False
    ),
    "fused_linear/qkv": lambda sizes: _linear(
        sizes, 3 * sizes.shape.width, sizes.shape.width, norm=True, gelu=False, residual=False
    ),
    "fused_linear/fc1": lambda sizes: _linear(
        sizes, sizes.shape.ffn, sizes.shape.width, norm=True, gelu=True, residual=False
    ),
    "fused_linear/fc2": lambda sizes: _linear(
        sizes, sizes.shape.width, sizes.shape.ffn, norm=False, gelu=False, residual=True
    ),
    "lm_head_verify/head": _head,
    "append_kv/new": _append,
    "compact_kv/all": _compact,
    "accept_and_rollback/accepted": lambda sizes: _accept(sizes, 0),
    "accept_and_rollback/rejected": lambda sizes: _accept(sizes, 1),
}
"""By op and use; the op is what stands before the slash. The whole step is kvspn.measure.steps's."""
OPS = tuple(dict.fromkeys(name.partition("/")[0] for name in CALLS))
WEIGHTED = ("fused_linear", "lm_head_verify")  # what integer formats change
_LONG = ("flat_kv_attention/self", "flat_kv_attention/cross-model", "compact_kv/all")  # what T changes


def own(device: str) -> dict[str, Any]:
    """The package's implementations on a device, each a namespace that holds its ops by name."""
    found = {name: import_module(f"kvspn.ops.{name}").reference for name in OPS}
    spaces: dict[str, Any] = {"reference": SimpleNamespace(**found)}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    native = [name for name in OPS if has_kernel(f"kvspn::{name}", device.upper())]
    if native:
        spaces["native"] = SimpleNamespace(**{name: getattr(kvspn.ops, name) for name in native})
    if device == "cuda" and backends()["triton"] is None:
        spaces["triton"] = import_module("kvspn.triton_kernels")
    return spaces


def run(
    implementations: Mapping[str, Any] | None = None,
    *,
    ops: Sequence[str] = OPS,
    shapes: Mapping[str, Shape] | None = None,
    formats: Sequence[str] = ("fp32",),
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (),
    rounds: int = 20,
    cold: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times implementations of ops in turn: {"machine", "warnings", "ops"}: docs/benchmark.md; a list of Row.

    Args:
        implementations: beside the package's own; by name, each an object whose attributes are ops with the
            signatures of kvspn.ops. Those that it lacks are left out.
        ops: of OPS.
        shapes, formats, batches, lengths, rounds, cold, progress: as in kvspn.measure.steps.run; whisperM2M's
            shape by default, formats of kvspn.weights.formats.FORMATS.
        device: "cpu" or "cuda".

    Raises:
        ValueError: another op; a name that the package has itself.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"ops must be of {', '.join(OPS)}, got {name!r}")
    spaces = own(device)
    if taken := set(spaces) & set(implementations or {}):
        raise ValueError(f"implementations must not be called {', '.join(spaces)}, got {taken.pop()!r}")
    spaces |= implementations or {}
    frame = Rounds(rounds, cold)
    rows = []
    named = {"whisperM2M": SHAPES["whisperM2M"]} if shapes is None else shapes
    for (name, shape), fmt, batch in product(named.items(), formats, batches):
        for i, length in enumerate(lengths or (shape.length,)):
            progress(f"{name}: ops, {fmt}, batch {batch}, T = {length}")
            sizes = Sizes(replace(shape, length=length), fmt, batch, device)
            calls = [
                call
                for call in CALLS
                if (op := call.partition("/")[0]) in ops
                and (not i or call in _LONG)
                and (FORMATS[fmt].quantise is None or op in WEIGHTED)
            ]
            cases = list(_cases(name, sizes, calls, spaces, cold))
            frame.time(cases)
            rows += [case.row() for case in cases]
    machine = frame.machine()
    return {"machine": machine, "warnings": warnings(rows, machine), "ops": rows}


@torch.no_grad()
def _cases(
    shape: str, sizes: Sizes, calls: Sequence[str], spaces: Mapping[str, Any], cold: bool
) -> Iterator[Case]:
    for what in calls:
        torch.manual_seed(0)
        call = CALLS[what](sizes)
        for backend, space in spaces.items():
            if (op := getattr(space, what.partition("/")[0], None)) is None:
                continue

            def once(call: Call = call, op: Callable[..., Any] = op) -> Any:
                return call.run(op)

            call.reset()
            correct = call.correct(once())
            counted = counts(once, sizes.device)
            yield Case(
                what=what,
                shape=shape,
                backend=backend,
                weights=sizes.weights,
                batch=sizes.batch,
                rows=call.rows,
                kv_length=call.kv_length,
                bytes=call.bytes,
                flops=call.flops,
                correct=correct,
                launches=counted["launches"],
                host_synchronisations=counted["host_synchronisations"],
                device=sizes.device,
                cache="cold" if cold else "warm",
                time=clock(once, call.reset, sizes.device, cold),
            )
