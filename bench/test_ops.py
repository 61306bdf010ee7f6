"""The ops, one call each, beside a plain formula in float64."""

from __future__ import annotations

import pytest
import torch

import kvspn.ops
from kvspn.measure.ops import CALLS, WEIGHTED, Sizes
from kvspn.weights.formats import FORMATS

_FLOATS = {fmt.dtype: name for name, fmt in FORMATS.items()}


@pytest.mark.parametrize(
    ("call", "weights"),
    [
        (call, weights)
        for call in CALLS
        for weights in (None, "fp8", "int8", "int4")
        if weights is None or call.startswith(WEIGHTED)
    ],
)
def test_op(timed, device, shape, dtype, call, weights):
    torch.manual_seed(0)
    made = CALLS[call](Sizes(shape, weights or _FLOATS[dtype], batch=1, device=device))
    name = call.partition("/")[0]
    op = getattr(kvspn.ops, name)
    assert made.correct(timed(lambda: made.run(op), made.bytes, made.reset, name))
