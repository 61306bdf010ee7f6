"""A trace of decoder steps for Perfetto or chrome://tracing, and for Nsight Systems: ranges with names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from kvspn.engines import Engine
from kvspn.engines.reference import ReferenceEngine
from kvspn.measure.shapes import begin, capacities, device_of, find_shapes, start
from kvspn.measure.timing import synchronise
from kvspn.ops.decoder_step import REFERENCE
from kvspn.weights.formats import quantise


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range of torch.profiler and, where CUDA is, of NVTX."""
    with record_function(name):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        yield
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


def _spanned(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return op(*args, **kwargs)

    return call


class _SpannedEngine(ReferenceEngine):
    """The reference, one row, each of its ops in a range of its own."""

    ops = SimpleNamespace(**{name: _spanned(name, op) for name, op in vars(REFERENCE).items()})

    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        self._together(self._rule(k, draft, draft_tokens))


def write_trace(
    file: Path,
    *,
    shape: str = "whisperM2M",
    weights: str = "bf16",
    backends: Sequence[str] = ("native", "reference"),
) -> None:
    """Chrome's trace JSON of a plain step and of a KVSPN step on each backend, batch 1.

    A range for each call of an engine; inside the reference backend's one for each op, and PyTorch's own
    inside those. On a GPU also its kernels.

    Args:
        file: written.
        shape, weights: as in kvspn.measure.profile.measure.
        backends: of kvspn.
    """
    ((_, sizes),) = find_shapes(shape).items()
    made = quantise(sizes.weights(), weights)
    engines: dict[str, Engine] = {}
    for name in backends:
        if name == "reference":
            engines[name] = begin(_SpannedEngine(made, batch=1, **capacities(sizes), kv=None), sizes)
        else:
            engines[name] = start(name, made, sizes)
    for engine in engines.values():
        for draft in (False, True):  # so that nothing is done for the first time
            engine.step(1, draft)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for name, engine in engines.items():
            for draft in (False, True):
                engine.lengths.fill_(sizes.length)
                with span(f"{name}: {'KVSPN' if draft else 'plain'} step"):
                    engine.step(1, draft)
                    synchronise(device_of(name))
    profiled.export_chrome_trace(str(file))
