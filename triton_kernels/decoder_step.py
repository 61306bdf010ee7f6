"""decoder_step: the step of all rows at once, composed from the ops here."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from kvspn.ops.decoder_step import composed, step
from kvspn.triton_kernels.accept_and_rollback import launch_accept_and_rollback
from kvspn.triton_kernels.append_kv import launch_append_kv
from kvspn.triton_kernels.flat_kv_attention import launch_flat_kv_attention
from kvspn.triton_kernels.fused_linear import launch_fused_linear
from kvspn.triton_kernels.launch import register
from kvspn.triton_kernels.lm_head_verify import launch_lm_head_verify

LAUNCHERS = SimpleNamespace(
    append_kv=launch_append_kv,
    flat_kv_attention=launch_flat_kv_attention,
    fused_linear=launch_fused_linear,
    lm_head_verify=launch_lm_head_verify,
    accept_and_rollback=launch_accept_and_rollback,
)

decoder_step = register("decoder_step", composed(functools.partial(step, LAUNCHERS)))
