"""Decoders whose tokens are written down in advance: what follows a token depends on that token alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvspn.weights import DecoderWeights
from kvspn.weights.decoder import Norm
from kvspn.weights.linear import Linear
from kvspn.weights.random import random_decoder

VOCABULARY = 64  # four tiles of a native matrix, so that each of four threads has one

Scores = Mapping[int, Mapping[int, float]]
"""By the newest token: logits of what may follow, 0 for others. After a token without an entry: token 0."""


def scripted_decoder(
    base: Scores, draft: Scores | None = None, listed: Tensor | None = None
) -> DecoderWeights:
    """A decoder with the logits `base` and a draft network with the logits `draft`.

    Embeddings are unit vectors, attention and feed-forward add nothing, and the last LayerNorm undoes itself;
    so the heads are tables.

    listed: int32 [Vd], the draft vocabulary; None is the whole one.
    """
    weights = random_decoder(
        heads=4, head_dim=16, vocabulary=VOCABULARY, positions=40, blocks=0 if draft is None else 1
    )
    layers = [
        layer._replace(self_out=_zero(layer.self_out), cross_out=_zero(layer.cross_out), fc2=_zero(layer.fc2))
        for layer in weights.layers
    ]
    blocks = [
        block._replace(kv_out=_zero(block.kv_out), cross_out=_zero(block.cross_out), fc2=_zero(block.fc2))
        for block in weights.blocks
    ]
    spread = torch.full((VOCABULARY,), (1 / VOCABULARY * (1 - 1 / VOCABULARY) + 1e-5) ** 0.5)

    def undone() -> Norm:
        return Norm(spread.clone(), torch.full((VOCABULARY,), 1 / VOCABULARY))

    return replace(
        weights,
        embed_tokens=torch.eye(VOCABULARY),
        embed_positions=torch.zeros(40, VOCABULARY),
        layers=tuple(layers),
        norm=undone(),
        head=Linear(_table(base)),
        blocks=tuple(blocks),
        draft_norm=None if draft is None else undone(),
        draft_head=None
        if draft is None
        else Linear(_table(draft) if listed is None else _table(draft)[listed]),
        draft_ids=listed,
    )


def chain(*tokens: int) -> dict[int, dict[int, float]]:
    """Each token follows the one before it."""
    return {one: {other: 1.0} for one, other in itertools.pairwise(tokens)}


def _table(scores: Scores) -> Tensor:
    """[V, V]: the logit of each token after each."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[0] = torch.tensor([0.0 if newest in scores else 1.0 for newest in range(VOCABULARY)])
    for newest, row in scores.items():
        for token, logit in row.items():
            table[token, newest] = logit
    return table


def _zero(linear: Linear | None) -> Linear:
    assert linear is not None
    return Linear(
        torch.zeros_like(linear.weight), None if linear.bias is None else torch.zeros_like(linear.bias)
    )
