"""Benchmarks: see conftest.py for how to run them."""

from torch import Tensor


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
