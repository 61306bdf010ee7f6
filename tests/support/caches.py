"""What tests do with engines and their caches, of whatever format."""

import torch
from torch import Tensor

from kvspn.engines import Engine
from kvspn.engines.cache import StepCache
from kvspn.weights import DecoderWeights


def random_states(weights: DecoderWeights, lengths: tuple[int, ...]) -> list[Tensor]:
    """The encoder's states of some utterances, [length, d] each; the same each time."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, weights.embed_tokens.shape[1], generator=generator) for n in lengths]


def tokens_of(engine: Engine) -> list[list[int]]:
    """Each row's tokens, the newest one included."""
    return [engine.tokens[b, : n + 1].tolist() for b, n in enumerate(engine.lengths.tolist())]


def poison(cache: StepCache) -> None:
    """NaN everywhere, so that who reads what was not written is found out."""
    for buffer in (cache.kv, cache.cross_kv, cache.kv_scale, cache.cross_kv_scale):
        if buffer is not None:
            buffer.fill_(torch.nan if buffer.is_floating_point() else -128)


def contents(cache: StepCache) -> list[Tensor]:
    """Of each row the valid positions [L, 2, H, T, D], int8 ones times their scales."""
    kv = cache.kv if cache.kv_scale is None else cache.kv * cache.kv_scale[..., None]
    return [kv[:, :, b, :, :length].clone() for b, length in enumerate(cache.lengths.tolist())]
