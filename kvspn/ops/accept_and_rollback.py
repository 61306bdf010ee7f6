"""accept_and_rollback: keep what the base model confirms of a draft, drop the rest by length alone."""

from __future__ import annotations

from torch import Tensor

from kvspn.checks import BOOL, FP32, INT32, Shapes, integer
from kvspn.ops._library import register
from kvspn.ops.lm_head_verify import K_INF


def check(
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
    shapes = Shapes()
    shapes.tensor("tokens", tokens, "B N", INT32)
    shapes.tensor("lengths", lengths, "B", INT32)
    shapes.tensor("finished", finished, "B", BOOL)
    shapes.tensor("stats", stats, "B 3", INT32)
    shapes.tensor("argmax", argmax, "B Q", INT32)
    if shapes["Q"] < 1:
        raise ValueError("argmax must hold at least one choice per row, got Q=0")
    shapes.sizes["Q-1"] = shapes["Q"] - 1
    shapes.tensor("draft", draft, "B Q-1", INT32)
    shapes.tensor("rank", rank, "B Q-1", INT32)
    integer("k", k, 1, K_INF)
    integer("eos", eos, -1, K_INF)
    integer("max_length", max_length, 1, shapes["N"])
    if (scores is None) != (log_probs is None):
        raise ValueError("log_probs must be given with scores and with them alone, got one of the two")
    if scores is not None and log_probs is not None:
        shapes.tensor("scores", scores, "B Q 3", FP32)
        shapes.tensor("log_probs", log_probs, "B N", FP32)


def reference(
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
    """Per row: the longest accepted prefix of the draft, the next token, stops, statistics, the rollback.

    The top-k validation of "Parasitic dual-scale modelling" (arXiv 2508.11189). With a = the longest prefix
    of the draft whose ranks are all under k, row b emits draft[b, :a] and then argmax[b, a], into
    tokens[b, lengths[b] + 1 ...]. Emission ends with an eos, with -1, which is no token (see
    :func:`lm_head_verify`), or with the row's token count at max_length; each finishes the row. lengths[b]
    grows by the number of emitted tokens: the cached positions of what was rejected now lie past it, and that
    is the whole rollback. Finished rows stay untouched.

    Args:
        tokens: int32 [B, N], changed in place. Row b holds lengths[b] + 1 tokens; the newest is not in the
            cache yet.
        lengths: int32 [B], positions in the cache; changed in place.
        finished: bool [B], changed in place.
        stats: int32 [B, 3], changed in place: steps + 1, drafted + the row's drafts, accepted + emitted ones.
        draft: int32 [B, Q-1]; a row's end at its first below 0. Without any the step is plain greedy.
        argmax, rank: int32 [B, Q] and [B, Q-1], from :func:`lm_head_verify`.
        k: 1 is greedy, K_INF accepts every draft.
        eos: the token that ends a row; -1 for none.
        max_length: 1 .. N.
        scores: fp32 [B, Q, 3], from :func:`lm_head_verify`.
        log_probs: fp32 [B, N], with scores: gets the logarithm of each emitted token's probability, where the
            token goes.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    for b, done in enumerate(finished.tolist()):
        if done:
            continue
        drafted = next((i for i, token in enumerate(draft[b].tolist()) if token < 0), draft.shape[1])
        accepted = 0
        while accepted < drafted and rank[b, accepted] < k:
            accepted += 1
        count = int(lengths[b]) + 1
        emitted = [*draft[b, :accepted].tolist(), int(argmax[b, accepted])][: max(max_length - count, 0)]
        last = next((n for n, token in enumerate(emitted) if token == eos or token < 0), None)
        if last is not None:
            del emitted[last + 1 :]
        here = slice(count, count + len(emitted))
        tokens[b, here] = tokens.new_tensor(emitted)
        if scores is not None and log_probs is not None:
            logits = [scores[b, i, 2 if i < accepted else 1] - scores[b, i, 0] for i in range(len(emitted))]
            log_probs[b, here] = log_probs.new_tensor(logits)
        lengths[b] += len(emitted)
        finished[b] = last is not None or count + len(emitted) >= max_length
        stats[b] += stats.new_tensor([1, drafted, min(accepted, len(emitted))])


accept_and_rollback = register(
    "accept_and_rollback(Tensor(a!) tokens, Tensor(b!) lengths, Tensor(c!) finished, Tensor(d!) stats, "
    "Tensor draft, Tensor argmax, Tensor rank, int k, int eos, int max_length, "
    "Tensor? scores=None, Tensor(e!)? log_probs=None) -> ()",
    check=check,
    fake=lambda *args, **kwargs: None,
    reference=reference,
)
