"""The decoder step as an object, on a chosen backend."""

from __future__ import annotations

import abc
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvspn.checks import FLOATS, FP32, Shapes, boolean, finite, integer
from kvspn.engines.cache import StepCache, draft_first
from kvspn.ops import K_INF
from kvspn.ops.decoder_step import check_drafts
from kvspn.ops.rules import Rule, check_rule
from kvspn.weights import DecoderWeights

PREFILL_CHUNK = 16  # query tokens of one pass

E = TypeVar("E", bound="CachedEngine")
P = ParamSpec("P")


def _alone(call: Callable[Concatenate[E, P], None]) -> Callable[Concatenate[E, P], None]:
    """A call under :meth:`Engine.alone`."""

    @functools.wraps(call)
    def guarded(self: E, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with self.alone():
            call(self, *args, **kwargs)

    return guarded


class Engine(abc.ABC):
    """Decodes a batch of rows, each independent of the others, in buffers whose addresses never change.

    Attributes:
        tokens: int32 [batch, capacity]; row b holds lengths[b] + 1 tokens, prompt included.
        lengths: int32 [batch], positions in the cache: all tokens but the newest.
        finished: bool [batch].
        stats: int32 [batch, 3]: steps, drafted tokens, accepted tokens.
        log_probs: fp32 [batch, capacity], of generated tokens, where start() asked for it: the logarithm of
            each one's probability under the masked logits, at temperature 1.
        logits: fp32 [batch, V], unmasked, of what follows the token of each prompt that start() asked for.
        lock: held from start() to the reading of the last token, where threads share an engine.
    """

    lock: AbstractContextManager[Any]
    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    stats: Tensor
    log_probs: Tensor
    logits: Tensor

    @abc.abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Serve nobody else: any call meanwhile, of another thread or of a streamer, is a RuntimeError."""

    @abc.abstractmethod
    def __init__(
        self,
        weights: DecoderWeights,
        *,
        batch: int,
        capacity: int,
        cross_capacity: int,
        kv: str | None = None,
    ) -> None:
        """Allocate everything: see :func:`engine`."""

    @abc.abstractmethod
    def start(
        self,
        encoder_states: Sequence[Tensor] | None,
        prompt: Sequence[Sequence[int]],
        *,
        eos: int,
        max_length: int,
        mask: Tensor | None = None,
        begin_mask: Tensor | None = None,
        rules: Sequence[Rule] | None = None,
        log_probs: bool = False,
        cross_queries: bool = False,
        logits_at: Sequence[int | None] | None = None,
    ) -> None:
        """Forget the last utterances, take new ones, and process their prompts up to the newest token.

        Args:
            encoder_states: per row one tensor [E_b, d] without padding; a tensor [batch, E, d] is such a
                sequence too. One tensor that stands for several rows is encoded once. None: those of the last
                start, whose cross-attention keys and values are kept, for other prompts; of these too is kept
                what a row's last prompt began with alike.
            prompt: per row one or more token ids; rows may differ in number.
            eos: the token that ends a row; -1 for none.
            max_length: tokens of a row at most, prompt included; at most capacity. A row whose prompt is
                that long is finished from the start.
            mask: fp32 [V], added to the logits of every step; -inf suppresses a token.
            begin_mask: fp32 [V], added to ``mask`` for the first generated token alone.
            rules: how each row's tokens are chosen; None for greedy.
            log_probs: whether steps write ``self.log_probs``.
            cross_queries: whether the prompts' passes and steps keep what :meth:`cross_scores` reads.
            logits_at: per row the index of a token of its prompt, but not of the newest: what follows it goes
                to ``self.logits``, from the pass that processes it. None: nothing of a row, or of any.

        Raises:
            TypeError, ValueError: naming the argument, before anything changes.
        """

    @abc.abstractmethod
    def step(self, k: int = 1, draft: bool = True, draft_tokens: Tensor | None = None) -> None:
        """One decoder step of every unfinished row: tokens, lengths, finished and stats move on.

        Args:
            k: a drafted token stands if it is among the k best; K_INF accepts every one.
            draft: False for a plain greedy step.
            draft_tokens: int32 [batch, 0 to 15], guesses of what follows each row's newest token, in place of
                the draft network's: all are verified in one pass. A row's end at the first that is no token.

        Raises:
            TypeError, ValueError: naming the argument; or a row whose logits give no token, see
                :meth:`check`. The other rows have moved on.
            RuntimeError: another call is using the engine.
        """

    @abc.abstractmethod
    def cross_scores(self, row: int, heads: Sequence[tuple[int, int]], positions: Sequence[int]) -> Tensor:
        """What tokens listen to: queries times keys of cross-attention over sqrt(D), before the softmax.

        From the passes that decoded the row, after a start() with ``cross_queries``: no other pass is made.

        Args:
            row: of the batch.
            heads: layer and head of each that is asked.
            positions: of tokens of the row that are in the cache, 0 .. lengths[row] - 1.

        Returns: fp32 [heads, positions, E], over the row's E encoder positions in their order.

        Raises:
            ValueError: naming the argument; or the last start() did not ask for cross_queries.
        """

    def check(self) -> None:
        """Raise ValueError if a row has ended without a token: NaN among its logits, or none above -inf.

        Its newest token is -1. A step that waits for its results raises this itself; after one that does not,
        on a device, this reads the rows back.
        """
        self._check_rows(self.finished)

    def _check_rows(self, chosen: Tensor) -> None:
        """The check of some rows, bool [batch]."""
        newest = self.tokens.gather(1, self.lengths.clamp(0, self.tokens.shape[1] - 1).long()[:, None])[:, 0]
        for row in (chosen & (newest < 0)).nonzero().flatten().tolist():
            raise ValueError(
                f"the logits of row {row} at position {int(self.lengths[row]) - 1} must be numbers, "
                "one of them above -inf, got NaN or -inf alone"
            )


class CachedEngine(Engine):
    """An engine on a StepCache: buffers, checks and the life of an utterance; a backend adds three passes."""

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        batch: int,
        capacity: int,
        cross_capacity: int,
        kv: str | None = None,
    ) -> None:
        if not isinstance(weights, DecoderWeights):
            raise TypeError(f"weights must be DecoderWeights, got {type(weights).__name__}")
        integer("batch", batch, 1, K_INF)
        integer("capacity", capacity, 1, weights.positions)
        integer("cross_capacity", cross_capacity, int(weights.architecture.cross), K_INF)
        if not weights.architecture.cross and cross_capacity:
            raise ValueError(f"cross_capacity must be 0 without cross-attention, got {cross_capacity}")
        if kv not in (None, "int8"):
            raise ValueError(f"kv must be int8, or None for the embeddings' dtype, got {kv!r}")
        self.lock = threading.RLock()  # a thread may hold it over several utterances
        self._weights = weights
        self._embed = weights.embed_tokens
        self.cache = StepCache(
            len(weights.layers),
            batch,
            weights.key_heads,
            self._embed.shape[1] // weights.heads,
            capacity,
            cross_capacity,
            self._embed.dtype if kv is None else torch.int8,
            self._embed.device,
        )
        with torch.inference_mode(False):
            self.tokens = torch.zeros(batch, capacity, dtype=torch.int32, device=self._embed.device)
            self.finished = torch.ones(batch, dtype=torch.bool, device=self._embed.device)
            self.stats = torch.zeros(batch, 3, dtype=torch.int32, device=self._embed.device)
            self.log_probs = torch.zeros(batch, capacity, device=self._embed.device)
            self.logits = torch.zeros(batch, len(self._embed), device=self._embed.device)
        self.lengths = self.cache.lengths
        self._free = threading.Lock()  # held by alone()
        # Whether the cache holds every row's encoder states, if there are any.
        self._encoded = not weights.architecture.cross
        self._prefilled: list[list[int]] = [[]] * batch  # of each row the tokens that start() has processed
        self._mask: Tensor | None = None
        self._first_mask: Tensor | None = None
        self._scored = False  # whether steps write log_probs
        self._queried = False  # whether the cache has the row's queries of cross-attention
        self._eos, self._max_length = -1, 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise RuntimeError("engine must be free, got one that another call is using")
        try:
            yield
        finally:
            self._free.release()

    @_alone
    @torch.no_grad()
    def start(
        self,
        encoder_states: Sequence[Tensor] | None,
        prompt: Sequence[Sequence[int]],
        *,
        eos: int,
        max_length: int,
        mask: Tensor | None = None,
        begin_mask: Tensor | None = None,
        rules: Sequence[Rule] | None = None,
        log_probs: bool = False,
        cross_queries: bool = False,
        logits_at: Sequence[int | None] | None = None,
    ) -> None:
        self._check_start(encoder_states, prompt, eos, max_length, mask, begin_mask)
        logits_at = [None] * len(prompt) if logits_at is None else logits_at
        if len(logits_at) != len(prompt):
            raise ValueError(f"logits_at must hold {len(prompt)} rows, got {len(logits_at)}")
        for row, position in enumerate(logits_at):
            if position is not None:
                integer(f"logits_at[{row}]", position, 0, len(prompt[row]) - 2)
        rules = [Rule()] * len(prompt) if rules is None else rules
        if len(rules) != len(prompt):
            raise ValueError(f"rules must hold {len(prompt)} rows, got {len(rules)}")
        for row, rule in enumerate(rules):
            check_rule(f"rules[{row}]", rule)
            if rule.timestamps is not None:
                integer(f"rules[{row}].timestamps.begin", rule.timestamps.begin, 1, len(self._embed) - 1)
        boolean("log_probs", log_probs)
        boolean("cross_queries", cross_queries)
        if cross_queries and not self._weights.architecture.cross:
            raise ValueError("cross_queries must be False without cross-attention, got True")
        self._eos, self._max_length, self._mask, self._scored = eos, max_length, mask, log_probs
        self._first_mask = begin_mask if mask is None or begin_mask is None else mask + begin_mask
        if cross_queries and self.cache.keep_queries():
            self._bind()
        if encoder_states is not None or cross_queries > self._queried:
            self._prefilled = [[]] * len(prompt)
        self._queried = cross_queries
        if encoder_states is not None:
            self._encoded = False
            self.cache.reset()
            given = list(encoder_states)
            for row, states in enumerate(given):
                first = next(i for i, other in enumerate(given) if other is states)
                if first == row:
                    self._encode(row, states)
                else:
                    self.cache.copy_cross(first, row)
            self._encoded = True
        self.stats.zero_()
        for row, (ids, position) in enumerate(zip(prompt, logits_at, strict=True)):
            self.tokens[row, : len(ids)] = self.tokens.new_tensor(ids)
            self.finished[row] = len(ids) >= max_length
            before, wanted = self._prefilled[row], list(ids[:-1])
            alike = map(operator.eq, before, wanted)
            kept = sum(1 for _ in itertools.takewhile(bool, alike))
            self._prefilled[row] = before[:kept]
            self._prefill(row, kept if position is None else min(kept, position), len(wanted), position)
            self._prefilled[row] = wanted
        self._choose(rules, [len(ids) for ids in prompt])

    @torch.no_grad()
    def step(self, k: int = 1, draft: bool = True, draft_tokens: Tensor | None = None) -> None:
        if draft_tokens is None:
            self.run(k, draft, steps=1)
        else:
            self._verify(k, draft_tokens)

    @_alone
    def _verify(self, k: int, draft_tokens: Tensor) -> None:
        """The step with the caller's drafts."""
        integer("k", k, 1, K_INF)
        check_drafts(draft_tokens, len(self.tokens), use_draft=False)
        if draft_tokens.device != self.tokens.device:
            raise ValueError(f"draft_tokens must be on {self.tokens.device}, got {draft_tokens.device}")
        self._step(k, False, draft_tokens)

    @_alone
    @torch.no_grad()
    def run(self, k: int = 1, draft: bool = True, *, steps: int) -> None:
        """Step until every row has finished, ``steps`` times at most; see :meth:`step`.

        One call of a backend that loops by itself, and there nothing waits for the device.
        """
        integer("steps", steps, 0, K_INF)
        integer("k", k, 1, K_INF)
        if draft and not self._weights.blocks:
            raise ValueError("draft must be False without draft blocks among the weights, got True")
        if steps == 1:
            self._step(k, draft)
        elif steps:
            self._run(k, draft, steps)

    @torch.no_grad()
    def cross_scores(self, row: int, heads: Sequence[tuple[int, int]], positions: Sequence[int]) -> Tensor:
        layers, _, batch, all_heads, _, width = self.cache.cross_kv.shape
        integer("row", row, 0, batch - 1)
        for layer, head in heads:
            integer("every layer of heads", layer, 0, layers - 1)
            integer("every head of heads", head, 0, all_heads - 1)
        length = int(self.lengths[row])
        for position in positions:
            integer("every one of positions", position, 0, length - 1)
        queries, scale = self.cache.cross_queries, self.cache.cross_kv_scale
        if queries is None or not self._queried:
            raise ValueError("cross_queries must be True in start() to have cross_scores, got False")
        device, encoded = queries.device, int(self.cache.cross_lengths[row])
        chosen = torch.tensor(list(heads), device=device).view(-1, 2)
        at = torch.tensor(list(positions), device=device, dtype=torch.long)
        of, head = chosen.T
        asked = queries[:, row].unflatten(-1, (all_heads, width))[of[:, None], at, head[:, None]]
        keys = self.cache.cross_kv[of, 0, row, head, :encoded].float()
        if scale is not None:
            keys *= scale[of, 0, row, head, :encoded, None]
        order = draft_first(torch.arange(encoded, device=device), self._weights.encoder_stride)
        scores = queries.new_empty(len(chosen), len(at), encoded)
        scores[..., order] = asked @ keys.mT * width**-0.5
        return scores

    def _bind(self) -> None:
        """Take the cache's buffers anew, of which there are more now."""

    @abc.abstractmethod
    def _encode(self, row: int, states: Tensor) -> None:
        """Write the cross-attention keys and values of one row's encoder states [E, d]."""

    @abc.abstractmethod
    def _prefill(self, row: int, first: int, count: int, position: int | None) -> None:
        """Process the tokens of one row from ``first`` to before ``count`` behind those that the cache holds,
        and write the row's logits behind the token at ``position``."""

    @abc.abstractmethod
    def _choose(self, rules: Sequence[Rule], first: Sequence[int]) -> None:
        """Take what the coming steps choose by: masks, the rows' rules, the indices of their first tokens."""

    @abc.abstractmethod
    def _step(self, k: int, draft: bool, draft_tokens: Tensor | None = None) -> None:
        """One checked step of every unfinished row."""

    def _run(self, k: int, draft: bool, steps: int) -> None:
        """Two checked steps or more, fewer where every row has finished."""
        for _ in range(steps):
            if self.finished.all():
                break
            self._step(k, draft)

    def _check_start(
        self,
        encoder_states: Sequence[Tensor] | None,
        prompt: Sequence[Sequence[int]],
        eos: int,
        max_length: int,
        mask: Tensor | None,
        begin_mask: Tensor | None,
    ) -> None:
        batch, capacity = self.tokens.shape
        vocabulary = len(self._embed)
        integer("eos", eos, -1, K_INF)
        integer("max_length", max_length, 1, capacity)
        if encoder_states is None and not self._encoded:
            raise ValueError("encoder_states must be given to the first start(), got None")
        if encoder_states is not None and not self._weights.architecture.cross:
            raise ValueError("encoder_states must be None without cross-attention, got some")
        for name, rows in (("encoder_states", encoder_states), ("prompt", prompt)):
            if rows is not None and len(rows) != batch:
                raise ValueError(f"{name} must hold {batch} rows, got {len(rows)}")
        shapes = Shapes()
        shapes.tensor("embed_tokens", self._embed, "V d", FLOATS)
        for row, states in enumerate(() if encoder_states is None else encoder_states):
            shapes.tensor(f"encoder_states[{row}]", states, "? d", FLOATS)
            finite(f"encoder_states[{row}]", states)
            integer(f"the number of encoder_states[{row}]", len(states), 1, self.cache.cross_kv.shape[4])
        for row, ids in enumerate(prompt):
            integer(f"the number of tokens in prompt[{row}]", len(ids), 1, max_length)
            for token in ids:
                integer(f"every token of prompt[{row}]", token, 0, vocabulary - 1)
        for name, value in (("mask", mask), ("begin_mask", begin_mask)):
            if value is not None:
                shapes.tensor(name, value, "V", FP32)
                if not (value < torch.inf).all():
                    raise ValueError(f"{name} must hold finite numbers or -inf, got NaN or inf")
