"""Greedy, sampled and speculative decoding: the loop around an engine's step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvspn.checks import integer
from kvspn.decoding.drafts import GivenDrafts
from kvspn.decoding.statistics import DecodeStats
from kvspn.engines import Engine
from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, Timestamps, check_rule, row_seed

Streamer = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class DecodeResult:
    """What came of a batch.

    sequences: per row its token ids, prompt and eos included. rows: their figures. total: the batch's.
    log_probs: where they were asked for, of each row's generated tokens: the logarithms of their
    probabilities under the masked logits, at temperature 1.
    """

    sequences: list[list[int]]
    rows: list[DecodeStats]
    total: DecodeStats
    log_probs: list[list[float]] | None = None


def parse_k(k: int | float | str) -> int:
    """An int >= 1, math.inf or "inf" -> the ops' k."""
    if k in (math.inf, "inf"):
        return K_INF
    integer("k", k, 1, K_INF)
    return int(k)


def decode(
    engine: Engine,
    encoder_states: Sequence[Tensor] | None,
    prompt: Sequence[Sequence[int]],
    *,
    eos: int | Sequence[int],
    max_length: int | Sequence[int],
    k: int | float | str = 1,
    draft: bool = True,
    draft_tokens: Sequence[Sequence[int]] | None = None,
    mask: Tensor | None = None,
    begin_mask: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | list[int] = 0,
    top_k: int = 0,
    timestamps: Timestamps | None = None,
    log_probs: bool = False,
    cross_queries: bool = False,
    streamer: Streamer | None = None,
) -> DecodeResult:
    """Decode one batch until every row has ended.

    With k = 1 the tokens are exactly those of ``draft=False``, plain decoding of the base model, greedy or
    sampled.
    Threads that share an engine wait for each other's utterances.

    Args:
        engine: its batch is the number of rows here.
        encoder_states, prompt, mask, begin_mask: as in :meth:`Engine.start`.
        eos: the token that ends a row, or several that do; -1 for none.
        max_length: tokens of a row at most, prompt included: one number for all rows or one a row.
        k: a drafted token stands if it is among the base model's k best; an int >= 1, math.inf or "inf".
        draft: False for plain greedy decoding.
        draft_tokens: per row a guess of what follows its prompt, as the last hypothesis of a stream is, of
            which up to 15 tokens are verified in a step (see :class:`kvspn.decoding.drafts.GivenDrafts`).
            Where it has none to offer the draft network goes on; a row without takes a plain step beside one
            that has.
        temperature: 0 for greedy decoding; else tokens are drawn from the softmax of logits / temperature.
        seed: 0 .. 2^64 - 1, of the draws: each row has its own, ``kvspn.ops.rules.row_seed(seed, row)``. Or
            one a row, with which it draws what it would draw alone.
        top_k: with a temperature, tokens are drawn among so many of the likeliest; 0 for all.
        timestamps: the grammar of timestamps that every row keeps to, its tokens in the vocabulary.
        log_probs: whether the result tells those of the generated tokens.
        cross_queries: whether :meth:`Engine.cross_scores` can be read afterwards.
        streamer: called as streamer(row, new_token_ids) after each step for each row that grew. For a
            TextStreamer of transformers and a batch of one, pass
            ``lambda row, ids: text_streamer.put(torch.tensor(ids))`` and call its ``end()`` afterwards. It
            may stop this by an exception, but not use the engine.

    Raises:
        TypeError, ValueError: naming the argument, before any step runs; or a row whose logits give no token.
        RuntimeError: the streamer used the engine.
    """
    accept = parse_k(k)
    ends = [eos] if isinstance(eos, int) else list(eos)
    limits = [max_length] * len(prompt) if isinstance(max_length, int) else list(max_length)
    _check_stops(prompt, ends, limits)
    guesses = GivenDrafts(draft_tokens, len(prompt), repeats=accept == 1)
    several = isinstance(seed, list)
    seeds = seed if isinstance(seed, list) else [seed] * len(prompt)
    if len(seeds) != len(prompt):
        raise ValueError(f"seed must be one for all rows or {len(prompt)}, got {len(seeds)}")
    rules = [Rule(temperature, each, timestamps, top_k) for each in seeds]
    for rule in rules:
        check_rule("", rule)
    rules = [rule._replace(seed=row_seed(rule.seed, 0 if several else row)) for row, rule in enumerate(rules)]
    with engine.lock:
        engine.start(
            encoder_states,
            prompt,
            eos=ends[0],
            max_length=max(limits),
            mask=mask,
            begin_mask=begin_mask,
            rules=rules,
            log_probs=log_probs,
            cross_queries=cross_queries,
        )
        sequences = [list(ids) for ids in prompt]
        seconds = [0.0] * len(sequences)
        # The engine knows one end and one limit; a row's own stop it here.
        full = [row for row, ids in enumerate(prompt) if len(ids) >= limits[row]]
        engine.finished[full] = True
        finished = engine.finished.tolist()
        begin = time.perf_counter()
        while not all(finished):
            engine.step(accept, draft, guesses.next(finished, engine.tokens))
            lengths = engine.lengths.tolist()
            now = time.perf_counter() - begin
            done = engine.finished.tolist()
            if done != finished:
                engine.check()
            for row, tokens in enumerate(sequences):
                if finished[row]:
                    continue
                new = engine.tokens[row, len(tokens) : min(lengths[row] + 1, limits[row])].tolist()
                new = new[: next((i + 1 for i, token in enumerate(new) if token in ends), len(new))]
                tokens += new
                guesses.advance(row, new)
                seconds[row] = now
                if not done[row] and (len(tokens) >= limits[row] or tokens[-1] in ends):
                    engine.finished[row] = done[row] = True
                if new and streamer is not None:
                    with engine.alone():
                        streamer(row, new)
            finished = done
        counts = engine.stats.tolist()
        scores = engine.log_probs.tolist() if log_probs else None
    elapsed = max(seconds)
    rows = [
        DecodeStats(len(tokens) - len(ids), steps, drafted, accepted, took)
        for tokens, ids, (steps, drafted, accepted), took in zip(
            sequences, prompt, counts, seconds, strict=True
        )
    ]
    generated = scores and [
        values[len(ids) : len(tokens)] for values, ids, tokens in zip(scores, prompt, sequences, strict=True)
    ]
    return DecodeResult(sequences, rows, DecodeStats.total(rows, elapsed), generated)


def _check_stops(prompt: Sequence[Sequence[int]], ends: Sequence[int], limits: Sequence[int]) -> None:
    if not ends:
        raise ValueError("eos must hold at least one token, got none")
    for token in ends:
        integer("eos", token, -1, K_INF)
    if len(limits) != len(prompt):
        raise ValueError(f"max_length must be one for all rows or {len(prompt)}, got {len(limits)}")
    for row, (ids, limit) in enumerate(zip(prompt, limits, strict=True)):
        integer("max_length", limit, 1, K_INF)
        integer(f"the number of tokens in prompt[{row}]", len(ids), 1, limit)
