"""What tests do to caches, of whatever format."""

import torch
from torch import Tensor

from kvspn.cache import StepCache


def poison(cache: StepCache) -> None:
    """NaN everywhere, so that who reads what was not written is found out."""
    for buffer in (cache.kv, cache.cross_kv, cache.kv_scale, cache.cross_kv_scale):
        if buffer is not None:
            buffer.fill_(torch.nan if buffer.is_floating_point() else -128)


def contents(cache: StepCache) -> list[Tensor]:
    """Of each row the valid positions [L, 2, H, T, D], int8 ones times their scales."""
    kv = cache.kv if cache.kv_scale is None else cache.kv * cache.kv_scale[..., None]
    return [kv[:, :, b, :, :length].clone() for b, length in enumerate(cache.lengths.tolist())]
