"""accept_and_rollback: one program per row, its Q tokens side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvspn.triton_kernels.launch import launch, register


@triton.jit(do_not_specialize=["k", "eos", "max_length"])
def accept_and_rollback_kernel(
    tokens, lengths, finished, stats, draft, argmax, rank, scores, log_probs,
    k, eos, max_length, queries,
    tokens_b, stats_b, draft_b, argmax_b, rank_b, scores_b, scores_q, log_probs_b,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if tl.load(finished + b) == 0:
        length = tl.load(lengths + b)
        count = length + 1  # of the row's tokens
        i = tl.arange(0, BLOCK_Q)
        guesses = tl.load(draft + b * draft_b + i, mask=i < queries - 1, other=-1)
        drafted = tl.min(tl.where(guesses < 0, i, BLOCK_Q), axis=0)
        ranks = tl.load(rank + b * rank_b + i, mask=i < drafted, other=0)
        accepted = tl.min(tl.where((i < drafted) & (ranks >= k), i, drafted), axis=0)
        chosen = tl.load(argmax + b * argmax_b + accepted)
        token = tl.where(i < accepted, guesses, chosen)
        emitted = tl.minimum(accepted + 1, tl.maximum(max_length - count, 0))
        ends = tl.min(tl.where((i < emitted) & ((token == eos) | (token < 0)), i, BLOCK_Q), axis=0)
        emitted = tl.minimum(emitted, ends + 1)
        tl.store(tokens + b * tokens_b + count + i, token, mask=i < emitted)
        if scores is not None:
            score = scores + b * scores_b + i * scores_q
            logit = tl.load(score + tl.where(i < accepted, 2, 1), mask=i < emitted, other=0)
            log_prob = logit - tl.load(score, mask=i < emitted, other=0)
            tl.store(log_probs + b * log_probs_b + count + i, log_prob, mask=i < emitted)
        tl.store(lengths + b, length + emitted)
        tl.store(finished + b, (ends < BLOCK_Q) | (count + emitted >= max_length))
        own = stats + b * stats_b
        tl.store(own, tl.load(own) + 1)
        tl.store(own + 1, tl.load(own + 1) + drafted)
        tl.store(own + 2, tl.load(own + 2) + tl.minimum(accepted, emitted))


def launch_accept_and_rollback(
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    stats: Tensor,
    draft: Tensor,
    argmax: Tensor,
    rank: Tensor,
    k: int,
    eos: int,
    max_length: int,
    scores: Tensor | None = None,
    log_probs: Tensor | None = None,
) -> None:
    """As :func:`kvspn.ops.accept_and_rollback`, unchecked."""
    batch, queries = argmax.shape
    launch(
        accept_and_rollback_kernel,
        (batch,),
        *(tokens, lengths, finished, stats, draft, argmax, rank, scores, log_probs),
        *(k, eos, max_length, queries),
        *(each.stride(0) for each in (tokens, stats, draft, argmax, rank)),
        *((None, None) if scores is None else scores.stride()[:2]),
        None if log_probs is None else log_probs.stride(0),
        BLOCK_Q=triton.next_power_of_2(queries),
        num_warps=1,
    )


accept_and_rollback = register("accept_and_rollback", launch_accept_and_rollback)
