"""Shared by all tests: the backends under test, and the yardsticks of numerical tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kvspn.ops

# A backend joins with a namespace that holds the ops by name.
BACKENDS: dict[str, ModuleType] = {"reference": kvspn.ops}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """The ops of each backend that can run here."""
    return BACKENDS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype of activations."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def assert_as_exact_as() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Compare with the float64 result: at most twice the error of the plain formula in the same dtype.

    And four roundings of the largest value, since a formula that happens to be exact would allow none.
    """

    def check(actual: Tensor, exact: Tensor, formula: Tensor) -> None:
        assert actual.dtype == formula.dtype
        assert actual.shape == exact.shape
        if not exact.numel():
            return
        error = (actual.double() - exact).abs().max()
        roundings = 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
        assert error <= 2 * (formula.double() - exact).abs().max() + roundings

    return check
