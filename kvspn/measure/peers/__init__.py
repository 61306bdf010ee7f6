"""Other runtimes on the same decoder step, for `kvspn bench --peers`.

One module each, imported only when it is asked for:

    FORMATS: the weight formats it has, and the bytes of a cached value in each.
    ROWS: query rows that a step of it can have.
    LAUNCHES: calls of its engine in a step; None for one that is many.
    prepare(problem, fmt) -> Step: builds it, with its best known settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.engines.reference import ReferenceEngine
from kvspn.ops.decoder_step import REFERENCE, base_pass, linear
from kvspn.weights import DecoderWeights

_PACKAGES = {  # what each needs beside torch
    "transformers": "transformers",
    "ctranslate2": "ctranslate2",
    "openvino": "openvino onnx",
    "onnxruntime": "onnxruntime onnx",
    "faster_whisper": "faster-whisper",
    "whisper_cpp": "pywhispercpp",
}
PEERS = ("transformers", "ctranslate2", "openvino", "onnxruntime")

# The relative error of logits (Frobenius) that a weight format explains; other rows' logits are off by 1.4.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.25, "int4": 0.6}

T = TypeVar("T")
Step = Callable[[int], tuple[float, Tensor]]  # query rows -> milliseconds, logits [rows, V]


class Skipped(Exception):
    """A peer that cannot run here; the text says why, and how it could."""


def load(name: str, package: str = __name__) -> ModuleType:
    """The module of a peer, of those in a package; raises Skipped."""
    try:
        return import_module(f"{package}.{name}")
    except ImportError as error:
        raise Skipped(f"{name}: skipped ({error}): pip install {_PACKAGES[name]} brings it") from error


class Problem:
    """The step that every peer takes: ``length`` positions in the cache, and the tokens that follow.

    Everything is on the device of the weights.

    Attributes:
        weights: the decoder, fp32.
        states: the encoder's output [E, d].
        prompt: the ``length`` tokens in the cache.
        newest: those of the step; one row takes the first.
        kv: [L, 2, H, T, D], cross_kv: [L, 2, H, E, D].
        logits: what both rows of the step must give [2, V].
    """

    def __init__(self, weights: DecoderWeights, length: int, positions: int) -> None:
        vocabulary, width = weights.embed_tokens.shape
        generator = torch.Generator().manual_seed(0)
        self.weights = weights
        self.device = weights.embed_tokens.device
        states = torch.randn(positions, width, generator=generator)
        self.states = F.layer_norm(states, (width,)).to(self.device)
        tokens = torch.randint(vocabulary, (length + 2,), generator=generator).tolist()
        self.prompt, self.newest = tokens[:length], tokens[length:]
        self._engine = ReferenceEngine(weights, batch=1, capacity=length + 2, cross_capacity=positions)
        self._engine.start([self.states], [tokens[: length + 1]], eos=-1, max_length=length + 2)
        self.kv = self._engine.cache.kv[:, :, 0, :, :length]
        self.cross_kv = self._engine.cache.cross_kv[:, :, 0]
        self.logits = self._reference()

    @torch.no_grad()
    def _reference(self) -> Tensor:
        cache, w = self._engine.cache, self.weights
        ids = torch.tensor([self.newest], dtype=torch.int32, device=self.device)
        x = base_pass(w, ids, cache.tensors)
        return linear(REFERENCE, x, w.head, w.norm)[0]

    def embedded(self, rows: int) -> Tensor:
        """The newest tokens as the first layer takes them [rows, d]."""
        positions = self.weights.position_rows[len(self.prompt) :][:rows]
        return self.weights.embed_tokens[self.newest[:rows]] + positions

    def correct(self, logits: Tensor, fmt: str) -> bool:
        """Whether logits [rows, V] are the reference's, up to what the weight format explains."""
        expected = self.logits[: len(logits)]
        error = (logits.float() - expected).norm() / expected.norm()
        same = torch.equal(logits.argmax(-1), expected.argmax(-1))
        return bool(error <= TOLERANCE[fmt]) and (same or fmt != "fp32")


def timed(call: Callable[[], T], reset: Callable[[], object] = lambda: None) -> tuple[float, T]:
    """Milliseconds of a call, after one that wakes threads and caches, and its result; each after a reset."""
    reset()
    call()
    reset()
    begin = time.perf_counter()
    result = call()
    return (time.perf_counter() - begin) * 1e3, result
