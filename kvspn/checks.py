"""Argument checks that the ops share, on the host: types, shapes, devices. `finite` alone reads the data."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP32 = (torch.float32,)
INT32 = (torch.int32,)
BOOL = (torch.bool,)
INT32_MAX = 2**31 - 1


class Shapes:
    """The letters of one call's shapes, each bound to a size by the first tensor that names it.

    >>> shapes = Shapes()
    >>> shapes.tensor("kv", kv, "L 2 B H S D", FLOATS)
    >>> shapes.tensor("lengths", lengths, "B", INT32)  # B as kv has it, on kv's device
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes: dict[str, int] = sizes
        self._first: tuple[str, torch.device] | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def tensor(self, name: str, value: object, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """Check one tensor and bind the letters of ``shape``.

        In ``shape`` a digit stands for itself, "?" for any size, and "..." in front for any leading
        dimensions. Any strides will do, as long as the last dimension is contiguous.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(short, dtypes))}, got {short(value.dtype)}")
        self._first = self._first or (name, value.device)
        if value.device != self._first[1]:
            raise ValueError(f"{name} must be on {self._first[1]} like {self._first[0]}, got {value.device}")
        letters, sizes = shape.split(), list(value.shape)
        if letters[0] == "...":
            del letters[0]
            sizes = sizes[-len(letters) :]
        if len(letters) != len(sizes) or not all(map(self._fits, letters, sizes)):
            raise ValueError(f"{name} must have shape {self._describe(shape)}, got {list(value.shape)}")
        if sizes[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {value.stride()}")

    def cache(self, name: str, value: object, scale: object, shape: str) -> None:
        """Check a cache, and its scales: fp32, one for each position and head of an int8 cache, else None."""
        self.tensor(name, value, shape, (*FLOATS, torch.int8))
        assert isinstance(value, Tensor)
        if value.dtype == torch.int8:
            self.tensor(f"{name}_scale", scale, shape.rpartition(" ")[0], (torch.float32,))
        elif scale is not None:
            raise ValueError(f"{name}_scale must be None beside a {short(value.dtype)} {name}, got a tensor")

    def _fits(self, letter: str, size: int) -> bool:
        if letter == "?":
            return True
        return size == (int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size))

    def _describe(self, shape: str) -> str:
        return "[" + ", ".join(f"{s}={self.sizes[s]}" if s in self.sizes else s for s in shape.split()) + "]"


def integer(name: str, value: object, low: int, high: int) -> None:
    """Check that ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def number(name: str, value: object) -> None:
    """Check that ``value`` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def finite(name: str, value: Tensor) -> None:
    """Check that no number is NaN or infinite, and say where the first is. Reads the tensor."""
    wrong = ~value.isfinite()
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {value[tuple(at)].item()} at {at}")


def boolean(name: str, value: object) -> None:
    """Check that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def same_dtype(name: str, value: Tensor, owner: str, dtype: torch.dtype) -> None:
    """Check that ``value`` has the dtype of another argument, ``owner``."""
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {short(dtype)} like {owner}, got {short(value.dtype)}")


def part(kv_scale: Tensor | None, *index: slice | int) -> Tensor | None:
    """The scales of a part of a cache."""
    return None if kv_scale is None else kv_scale[index]


def short(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")
