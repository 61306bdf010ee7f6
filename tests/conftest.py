"""Shared by all tests: the backends under test, and the yardsticks of numerical tests."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvspn.ops
from kvspn.ops.decoder_step import REFERENCE
from support import emulated
from support.commands import clip, root, use_root  # noqa: F401
from support.skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

# Before any test module asks which backends there are; where a GPU is, its own build is tested.
if not torch.cuda.is_available():
    emulated.load()

OPS = tuple(name for name in kvspn.ops.__all__ if name.islower())


def _reference(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"kvspn.ops.{name}")

    def checked(*args: Any, **kwargs: Any) -> Any:
        module.check(*args, **kwargs)
        return module.reference(*args, **kwargs)

    return checked


# A backend joins with a namespace that holds its ops by name.
BACKENDS = {"reference": SimpleNamespace(**{name: _reference(name) for name in OPS})}
if importlib.util.find_spec("kvspn._torch_ops"):
    BACKENDS["native"] = SimpleNamespace(**{name: getattr(kvspn.ops, name) for name in OPS})
_TRITON = all(map(importlib.util.find_spec, ("triton", "kvspn.triton_kernels")))
if _TRITON and not torch.cuda.is_available():
    # Triton looks at it when kernels are defined, and when the first launch imports gluon.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon.language  # noqa: F401

        import kvspn.triton_kernels

    BACKENDS["triton"] = SimpleNamespace(
        **{name: getattr(kvspn.triton_kernels, name) for name in OPS if hasattr(kvspn.triton_kernels, name)}
    )
if emulated.OPS_PATH.exists() and not torch.cuda.is_available():
    BACKENDS["cuda"] = emulated.ops()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`ops`: of each backend that has the op that the test file is named after, or else those of a step."""
    if "ops" in metafunc.fixturenames:
        needed = {metafunc.module.__name__.rpartition("test_ops_")[2]} & set(OPS) or {
            *vars(REFERENCE),
            "decoder_step",
        }
        found = {name: ops for name, ops in BACKENDS.items() if needed <= set(vars(ops))}
        metafunc.parametrize("ops", found.values(), ids=found)


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
