"""The ops: each a contract, its checks and a plain-PyTorch reference, dispatched by device.

A backend joins by registering its kernel for ``torch.ops.kvspn.<op>`` under its dispatch key (CPU, CUDA).
The reference serves the rest; it takes every row and query on its own and so reads lengths on the host.
Native kernels serve all ops on CUDA devices, where csrc/cuda is built, and flat_kv_attention on the CPU,
whose matrices want packing first, which an engine does.
"""

import functools

import torch

from kvspn.ops._library import load_native, serve
from kvspn.ops.accept_and_rollback import accept_and_rollback
from kvspn.ops.append_kv import append_kv
from kvspn.ops.compact_kv import compact_kv
from kvspn.ops.decoder_step import composed, decoder_step, step
from kvspn.ops.flat_kv_attention import flat_kv_attention
from kvspn.ops.fused_linear import fused_linear
from kvspn.ops.lm_head_verify import K_INF, lm_head_verify

__all__ = [
    "K_INF",
    "accept_and_rollback",
    "append_kv",
    "compact_kv",
    "decoder_step",
    "flat_kv_attention",
    "fused_linear",
    "lm_head_verify",
]

for _key in load_native():
    serve("decoder_step", _key, composed(functools.partial(step, torch.ops.kvspn)))
