"""Whether the CUDA engine works at all in one way of running: python -m bench.smoke persistent|graph|kernels

Two utterances, greedy and with KVSPN, against the reference's tokens. A process of its own, since a kernel
that never ends takes its process with it.
"""

from __future__ import annotations

import os
import sys

import torch

from kvspn.decoding import decode
from kvspn.engines import engine
from kvspn.weights.random import random_decoder

SHAPE = {"heads": 4, "head_dim": 64, "layers": 4, "blocks": 2, "ffn": 1024, "vocabulary": 3001}
LENGTH = 40


def tokens(backend: str, device: str, positions: tuple[int, int], *, draft: bool) -> list[list[int]]:
    """Two utterances of random weights, decoded together."""
    weights = random_decoder(positions=LENGTH, **SHAPE)
    width, generator = weights.embed_tokens.shape[1], torch.Generator().manual_seed(0)
    states = [torch.randn(n, width, generator=generator).to(device) for n in positions]
    runner = engine(backend, weights.to(device), batch=2, capacity=LENGTH, cross_capacity=max(positions))
    return decode(runner, states, [[1, 2, 3], [4]], eos=0, max_length=LENGTH, draft=draft).sequences


def main(mode: str, device: str = "cuda", positions: tuple[int, int] = (150, 64)) -> None:
    """Prints what was compared. positions: of each utterance's encoder.

    Raises:
        AssertionError: the tokens are not the reference's.
    """
    os.environ["KVSPN_CUDA_STEP"] = mode
    expected = tokens("reference", "cpu", positions, draft=False)
    for draft in (False, True):
        found = tokens("cuda", device, positions, draft=draft)
        assert found == expected, f"{mode}, draft {draft}: {found} where the reference has {expected}"
    print(f"{mode}: the reference's {sum(map(len, expected))} tokens, greedy and with KVSPN")


if __name__ == "__main__":
    main(sys.argv[1])
