"""The engine that a model keeps, packed from its present weights and packed again when they change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvspn.engines import Engine, default_backend
from kvspn.models.weights import check_plain, packed_parts

if TYPE_CHECKING:
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    cross_capacity: int
    engine: Engine


# Beside the models, not in them: an engine is neither saved nor copied with its model, and is freed with it.
_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_lock = threading.Lock()


def packed_engine(
    model: WhisperM2MForConditionalGeneration, batch: int, cross_capacity: int, backend: str | None = None
) -> Engine:
    """An engine for `batch` rows of at most `cross_capacity` encoder positions, with the model's weights.

    The last one is kept with the model while batch, backend and torch's threads stay the same and the weights
    are what they were, adapters included. That is known from their addresses and version counters, and, since
    changes through `.data` move neither, from sums over them, which read every weight once, as a decoder step
    does.

    Raises:
        TypeError: naming the module that is not plain (see `kvspn.models.weights.check_plain`).
    """
    check_plain(packed_parts(model))
    backend = backend or default_backend(model.device)
    with _lock:
        key = (batch, backend, torch.get_num_threads(), *_fingerprint(model))
        kept = _kept.get(model)
        if kept is None or kept.key != key or kept.cross_capacity < cross_capacity:
            _kept.pop(model, None)
            kept = None  # before the next is packed, so that memory holds one alone
            positions = max(cross_capacity, model.config.max_source_positions)
            kept = _Kept(key, positions, model.engine(batch, positions, backend))
            _kept[model] = kept
        return kept.engine


def _fingerprint(model: WhisperM2MForConditionalGeneration) -> Iterator[Any]:
    """What differs as soon as the model's decoder does."""
    tensors: dict[int, Tensor] = {}
    for part in packed_parts(model).values():
        for module in part.modules():
            if hasattr(module, "merged_adapters"):  # a layer with PEFT's adapters
                scaling = getattr(module, "scaling", None)
                yield str((module.active_adapters, module.disable_adapters, module.merged_adapters, scaling))
        tensors |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    for tensor in tensors.values():
        version = None if tensor.is_inference() else tensor._version
        yield tensor.data_ptr(), version, tensor.shape, tensor.dtype, tensor.device
    yield torch.stack([_checksum(tensor.detach()) for tensor in tensors.values()]).tolist()


def _checksum(tensor: Tensor) -> Tensor:
    """int64 []: the sum of the words in the tensor's memory, each row's with a factor of its own."""
    rows = tensor.contiguous().view(len(tensor) if tensor.dim() > 1 else 1, -1)
    width = rows.shape[1] * rows.element_size()
    words = rows.view(torch.int64 if width % 8 == 0 else torch.uint8).sum(1, dtype=torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
