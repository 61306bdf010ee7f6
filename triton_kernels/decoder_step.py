"""decoder_step: the step of all rows at once, composed from the ops here."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from kvspn.ops import DecoderWeights
from kvspn.ops.decoder_step import step
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


def launch_decoder_step(
    kv: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    finished: Tensor,
    stats: Tensor,
    cross_kv: Tensor,
    cross_lengths: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    k: int,
    eos: int,
    max_length: int,
    use_draft: bool = True,
    groups: int = 0,
    last_layer_only: bool = False,
    kv_scale: Tensor | None = None,
    cross_kv_scale: Tensor | None = None,
) -> None:
    """As :func:`kvspn.ops.decoder_step`, unchecked."""
    w = DecoderWeights.unflatten(
        weights, heads=kv.shape[3], num_layers=kv.shape[0], groups=groups, last_layer_only=last_layer_only
    )
    step(
        LAUNCHERS, w, kv, lengths, tokens, finished, stats, cross_kv, cross_lengths, mask,
        k, eos, max_length, use_draft, kv_scale, cross_kv_scale,
    )  # fmt: skip


decoder_step = register("decoder_step", launch_decoder_step)
