"""The ops in Triton: readable kernels for every GPU that Triton serves, one file per op.

Each op here has the contract, the checks and the shapes of its namesake in :mod:`kvspn.ops`, and is
``torch.ops.kvspn_triton.<op>``, so that it composes with torch.compile. Tensors live on a GPU; with
TRITON_INTERPRET=1 in the environment before Triton is imported, on the CPU.
"""

from kvspn.triton_kernels.accept_and_rollback import accept_and_rollback
from kvspn.triton_kernels.append_kv import append_kv
from kvspn.triton_kernels.compact_kv import compact_kv
from kvspn.triton_kernels.decoder_step import decoder_step
from kvspn.triton_kernels.flat_kv_attention import flat_kv_attention
from kvspn.triton_kernels.fused_linear import fused_linear
from kvspn.triton_kernels.lm_head_verify import lm_head_verify

__all__ = [
    "accept_and_rollback",
    "append_kv",
    "compact_kv",
    "decoder_step",
    "flat_kv_attention",
    "fused_linear",
    "lm_head_verify",
]
