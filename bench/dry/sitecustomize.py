"""Python as it is on a GPU machine, for bench/gpu.sh --dry: a few packages and what they need, no network.

Python imports this by itself where its folder is in PYTHONPATH.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from types import ModuleType

THERE = [
    "torch",
    "triton",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "peft",
    "accelerate",
    "typer",
]
THERE += ["rich", "sacrebleu", "pytest", "pytest-timeout", "pytest-xdist", "pytest-benchmark", "pybind11"]
THERE += ["ninja", "setuptools", "pip", "hypothesis"]


def needed(names: Sequence[str]) -> set[str]:
    """These distributions and what they need without extras, as far as it is here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        left += [re.split(r"[^\w.-]", each)[0] for each in wanted if "extra ==" not in each]
    return found


class Missing(MetaPathFinder):
    """Refuses modules of other distributions."""

    def __init__(self) -> None:
        there = needed(THERE) | {"kvspn"}
        self._refused = {
            module
            for module, distributions in packages_distributions().items()
            if not any(re.sub(r"[-_.]+", "-", each).lower() in there for each in distributions)
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self._refused:
            raise ModuleNotFoundError(f"No module named {name!r} on a GPU machine", name=name)
        return None


def offline(*_: object) -> None:
    raise OSError("there is no network on a GPU machine")


sys.meta_path.insert(0, Missing())
socket.socket.connect = offline  # type: ignore[method-assign, assignment]
