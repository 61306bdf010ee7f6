"""CTranslate2: a translation model with the same decoder, timed from token to token of a greedy search."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from statistics import median
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.specs import common_spec, transformer_spec
from torch import Tensor

from kvspn.measure.peers import Problem, Step
from kvspn.weights import Linear, Norm

FORMATS = {"fp32": 4, "int8": 4}
ROWS = (1,)
LAUNCHES = 1
_STEPS = 4  # timed in a search, after the first


def prepare(problem: Problem, fmt: str) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        spec = _spec(problem)
        spec.validate()
        spec.optimize()
        spec.save(folder)
        del spec
        translator = ctranslate2.Translator(
            folder,
            compute_type={"fp32": "float32", "int8": "int8"}[fmt],
            intra_threads=torch.get_num_threads(),
        )
    source = [[str(i) for i in range(len(problem.states))]]
    forced = [str(token) for token in (*problem.prompt[1:], problem.newest[0])]
    length = len(problem.prompt)

    def step(rows: int) -> tuple[float, Tensor]:
        ends: list[float] = []
        logits: list[Any] = []

        def made(token: Any) -> bool:
            if token.step >= length:
                ends.append(time.perf_counter())
                logits.append(token.logits)
            return False

        translator.translate_batch(
            source,
            [forced],
            beam_size=1,
            max_input_length=0,
            max_decoding_length=length + _STEPS + 1,
            callback=made,
            return_logits_vocab=True,
        )
        seconds = median(after - before for before, after in pairwise(ends))
        return seconds * 1e3, torch.from_numpy(np.array(logits[0]))

    return step


def _spec(problem: Problem) -> transformer_spec.TransformerSpec:
    """The decoder, behind an encoder whose one layer adds nothing to its embeddings: the states."""
    w, width = problem.weights, problem.states.shape[1]
    sizes = {"num_heads": w.heads, "activation": common_spec.Activation.GELU}
    encoder = transformer_spec.TransformerEncoderSpec(1, **sizes)
    decoder = transformer_spec.TransformerDecoderSpec(len(w.layers), **sizes)
    spec = transformer_spec.TransformerSpec(encoder, decoder)
    one = Norm(torch.ones(width), torch.zeros(width))
    nothing = Linear(torch.zeros(width, width), torch.zeros(width))
    nothing_thrice = Linear(torch.zeros(3 * width, width), torch.zeros(3 * width))
    encoder.scale_embeddings = decoder.scale_embeddings = False
    encoder.embeddings[0].weight = problem.states.numpy()
    encoder.position_encodings.encodings = np.zeros_like(problem.states)
    _norm(encoder.layer_norm, one)
    _attention(encoder.layer[0].self_attention, one, nothing_thrice, nothing)
    _feed_forward(encoder.layer[0].ffn, one, nothing, nothing)

    decoder.embeddings.weight = w.embed_tokens.numpy()
    decoder.position_encodings.encodings = w.position_rows.numpy()
    decoder.projection.weight = w.head.weight.numpy()
    _norm(decoder.layer_norm, w.norm)
    for to, layer in zip(decoder.layer, w.layers, strict=True):
        _attention(to.self_attention, layer.self_norm, layer.self_qkv, layer.self_out)
        _attention(to.attention, *layer.cross)
        _feed_forward(to.ffn, layer.ffn_norm, layer.fc1, layer.fc2)

    spec.register_source_vocabulary([str(i) for i in range(len(problem.states))])
    spec.register_target_vocabulary([str(i) for i in range(len(w.embed_tokens))])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "0", "1", "2"
    spec.config.decoder_start_token = str(problem.prompt[0])
    spec.config.add_source_bos = spec.config.add_source_eos = False
    return spec


def _norm(to: Any, norm: Norm) -> None:
    assert norm.bias is not None
    to.gamma, to.beta = norm.weight.numpy(), norm.bias.numpy()


def _attention(to: Any, norm: Norm, *linears: Linear) -> None:
    _norm(to.layer_norm, norm)
    for each, linear in zip(to.linear, linears, strict=True):
        _linear(each, linear)


def _feed_forward(to: Any, norm: Norm, fc1: Linear, fc2: Linear) -> None:
    _norm(to.layer_norm, norm)
    _linear(to.linear_0, fc1)
    _linear(to.linear_1, fc2)


def _linear(to: Any, linear: Linear) -> None:
    to.weight = linear.weight.numpy()
    if linear.bias is not None:
        to.bias = linear.bias.numpy()
