"""Registration of the ops with PyTorch: schema, shapes for tracing, and the reference kernel."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_libraries: dict[str, torch.library.Library] = {}
_contracts: dict[str, tuple[str, Callable[..., object], Callable[..., Any]]] = {}  # schema, check, fake


def register(
    schema: str,
    *,
    check: Callable[P, object],
    fake: Callable[P, R],
    reference: Callable[P, R],
    namespace: str = "kvspn",
) -> Callable[P, R]:
    """Define ``torch.ops.<namespace>.<name>`` and return the public function that calls it.

    The reference serves every device (CompositeExplicitAutograd) until a backend registers a kernel for one
    (CPU, CUDA). No op has a gradient: results never require one, so that backward() through an op is refused.

    ``check`` runs before any kernel: in the public function, so that every backend refuses the same calls in
    the same words; and in the fake and the reference, for those who trace or who call ``torch.ops`` directly.
    It must look at types, shapes and devices only.
    """
    name = schema.partition("(")[0]
    _contracts[name] = schema, check, fake
    library = _libraries.get(namespace) or torch.library.Library(namespace, "DEF")
    _libraries[namespace] = library

    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _checked(check, reference), "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{namespace}::{name}", traced, lib=library)
    overload = getattr(getattr(torch.ops, namespace), name).default

    @functools.wraps(reference)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            check(*args, **kwargs)
        return overload(*args, **kwargs)

    public.__name__ = public.__qualname__ = name
    return public


def implement(name: str, namespace: str, kernel: Callable[P, R]) -> Callable[P, R]:
    """Another implementation of the op ``name``, under its contract: ``torch.ops.<namespace>.<name>``."""
    schema, check, fake = _contracts[name]
    return register(schema, check=check, fake=fake, reference=kernel, namespace=namespace)


def serve(name: str, key: str, kernel: Callable[..., object]) -> None:
    """Another kernel of ``torch.ops.kvspn.<name>``, for tensors of one dispatch key (CPU, CUDA)."""
    _, check, _ = _contracts[name]
    _libraries["kvspn"].impl(name, _checked(check, kernel), key)


def _checked(check: Callable[P, object], kernel: Callable[P, R]) -> Callable[P, R]:
    @torch.no_grad()
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return checked


def load_native() -> list[str]:
    """Registers the kernels of csrc/bindings/torch_ops.cpp that are built: for tensors on the CPU, and for
    those on a CUDA device, if torch knows such devices. Returns the dispatch keys that they serve."""
    modules = {"CPU": "_torch_ops"}
    if torch.backends.cuda.is_built():
        modules["CUDA"] = "_torch_ops_cuda"
    loaded = []
    for key, name in modules.items():
        found = importlib.util.find_spec(f"kvspn.{name}")
        if found is not None and found.origin is not None:
            torch.ops.load_library(found.origin)
            loaded.append(key)
    return loaded
