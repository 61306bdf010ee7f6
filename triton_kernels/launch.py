"""How every kernel here is launched, registered and, for ahead-of-time compilation, recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvspn.ops._library import P, R, implement

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """One launch: args in the kernel's order; options are its constants and the compiler's settings."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("_recorded", default=None)


def _is_fp8(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.dtype == torch.float8_e4m3fn


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the device of the first argument; nothing for an empty grid. fp8 goes as its bytes."""
    if not all(grid):
        return
    args = tuple(arg.view(torch.uint8) if _is_fp8(arg) else arg for arg in args)
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, options))
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are not made but listed; tensors may be on the meta device."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def result(like: Tensor, *shape: int) -> Tensor:
    """An output that a kernel rounds to the dtype of ``like``.

    The interpreter's own rounding to bf16 loses carries, so there torch rounds, after the kernel.
    """
    return like.new_empty(shape, dtype=torch.float32 if INTERPRETED else like.dtype)


def register(name: str, kernel: Callable[P, R]) -> Callable[P, R]:
    """The op ``torch.ops.kvspn_triton.<name>``, by the contract of ``kvspn.ops.<name>``."""

    def placed(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            needed = "the CPU, where TRITON_INTERPRET=1 runs them" if INTERPRETED else "a GPU"
            raise ValueError(f"tensors must be on {needed}, got {device}")
        return kernel(*args, **kwargs)

    return implement(name, "kvspn_triton", placed)
