"""The decoder step, timed on every backend and weight format, each with a correctness check beside it.

Everything in one weight format is timed in turn, round after round, the peers too, and in every round a bare
read of as many bytes: what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import product
from statistics import median
from types import ModuleType
from typing import Any

import torch

from kvspn.engines import Engine
from kvspn.measure import allocations
from kvspn.measure.comparison import DERIVED
from kvspn.measure.correctness import Expected
from kvspn.measure.intervals import of_median, ratio
from kvspn.measure.peers import PEERS, Problem, Skipped, load
from kvspn.measure.shapes import UNPRUNED, Shape, device_of, start
from kvspn.measure.timing import Case, Rounds, Row, clock, counts, warnings
from kvspn.weights import DecoderWeights, Linear
from kvspn.weights.formats import FORMATS, base_and_draft, quantise


def run(
    shapes: Mapping[str, Shape],
    backends: Sequence[str],
    formats: Sequence[str],
    rounds: int = 20,
    peers: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    skipped: Callable[[str], None] = lambda text: None,
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (),
    cold: bool = False,
    kv: Sequence[str] = (),
    weights: DecoderWeights | None = None,
    tokens_per_step: float | None = None,
) -> dict[str, Any]:
    """Times the cases: {"machine", "rows", "summary", ...} of docs/benchmark.md, with a list of Row.

    Args:
        shapes: by the names that rows have, those of kvspn.measure.shapes.SHAPES for example.
        backends: of kvspn.
        formats: of kvspn.weights.formats.base_and_draft; a peer has the base model's, once.
        rounds: timings of each case.
        peers: of PEERS. They decode one row, at the first of the lengths.
        progress: told what is going on.
        skipped: told what is left out, and why.
        batches: rows decoded together.
        lengths: T, positions in the self-attention cache, 1 to the shape's max_length; by default its own.
        cold: with the caches emptied before each timing; peers cannot have that.
        kv: formats of the caches beside that of the embeddings, for kvspn's steps: "int8".
        weights: the decoder to measure, fp32, where there is one shape; None: random ones.
        tokens_per_step: by which "token" rows divide; None: what the miniature reaches in a row's format.

    Raises:
        ValueError: another format; a length out of range; weights for several shapes; peers and cold.
    """
    if cold and peers:
        raise ValueError("cold must be False with peers, whose steps are timed warm; got True")
    for name, shape in shapes.items():
        for length in lengths:
            if not 1 <= length <= shape.max_length:
                raise ValueError(f"lengths must be from 1 to {shape.max_length} for {name}, got {length}")
    if weights is not None and len(shapes) != 1:
        raise ValueError(f"shapes must hold that of the weights alone, got {', '.join(shapes)}")
    bench = _Bench(shapes, rounds, cold, tokens_per_step, progress, skipped)
    modules = {}
    for peer in peers:
        try:
            modules[peer] = load(peer)
        except Skipped as reason:
            skipped(str(reason))
    widths: dict[str, list[str]] = {}
    for fmt in formats:
        widths.setdefault(_width(fmt), []).append(fmt)
    for name, base in shapes.items():
        if weights is None:
            progress(f"{name}: random weights")
        made = base.weights() if weights is None else weights
        first, *_ = lengths or (base.length,)
        problem = Problem(made, first, base.encoder_positions) if modules else None
        for batch, length in product(batches, lengths or (base.length,)):
            shape = replace(base, length=length)
            for width, ours in widths.items():
                cases: list[Case] = []
                for fmt in ours:
                    for backend in backends:
                        progress(f"{name}: {backend}, {fmt}, batch {batch}, T = {length}")
                        for caches in (None, *kv):
                            cases += bench.own_cases(name, shape, made, backend, fmt, batch, caches)
                if (batch, length) == (1, first):
                    cases += bench.peer_cases(modules, problem, name, shape, width)
                bench.time(cases)
        bench.forget()
        del made, problem, cases
    for name, base in shapes.items():  # last, since they need the most memory
        if name in UNPRUNED and "transformers" in modules and "fp32" in widths:
            first, *_ = lengths or (base.length,)
            name, shape = UNPRUNED[name]
            shape = replace(shape, length=first)
            progress(f"{name}: random weights")
            problem = Problem(shape.weights(), shape.length, shape.encoder_positions)
            transformers = {"transformers": modules["transformers"]}
            bench.time(list(bench.peer_cases(transformers, problem, name, shape, "fp32")))
    return bench.document()


class _Bench:
    """The rows so far, and what they are measured with."""

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        rounds: int,
        cold: bool,
        tokens_per_step: float | None,
        progress: Callable[[str], None],
        skipped: Callable[[str], None],
    ) -> None:
        self._shapes = shapes
        self._rounds, self._cold = Rounds(rounds, cold), cold
        self._tokens_per_step = tokens_per_step
        self._progress, self._skipped = progress, skipped
        self._rows: list[Row] = []
        self._costs: dict[str, dict[str, Any]] = {
            name: {} for name in ("two_row_cost", "draft_overhead", "tokens_per_step")
        }
        self._intervals: dict[str, dict[str, Any]] = {"two_row_cost": {}, "draft_overhead": {}}
        self._expected: dict[tuple[int, str, int, str | None, str], Expected] = {}

    def own_cases(
        self,
        name: str,
        shape: Shape,
        made: DecoderWeights,
        backend: str,
        fmt: str,
        batch: int,
        kv: str | None,
    ) -> Iterator[Case]:
        weights = quantise(made, fmt)
        whole, two_row = (start(backend, each, shape, batch, kv) for each in (weights, faint_draft(weights)))
        device = device_of(backend)

        def back(engine: Engine) -> None:
            engine.lengths.fill_(shape.length)
            engine.finished.fill_(False)

        def tokens(engine: Engine, draft: bool) -> list[list[int]]:
            back(engine)
            for _ in range(3):
                engine.step(1, draft)
            found: list[list[int]] = engine.tokens[:, : shape.length + 4].tolist()
            return found

        plain = tokens(whole, draft=False)
        correct = plain == tokens(whole, draft=True) == tokens(two_row, draft=True)
        correct &= self._expect(made, weights, fmt, shape, kv, device).of(whole)

        allocated = _allocations(shape.layers, shape.groups, backend, fmt, kv)
        bare, drafting = (step_bytes(weights, shape, batch, draft, kv) for draft in (False, True))
        one, two, all_of_it = (
            step_flops(made, shape, batch, rows, draft) for rows, draft in ((1, False), (2, False), (2, True))
        )

        def case(what: str, rows: int, size: int, flops: int, engine: Engine, draft: bool) -> Case:
            back(engine)
            counted = counts(lambda: engine.step(1, draft), device)
            return Case(
                what=what,
                shape=name,
                backend=backend,
                weights=fmt,
                batch=batch,
                rows=rows,
                kv_length=shape.length,
                bytes=size,
                flops=flops,
                correct=correct,
                launches=counted["launches"],
                host_synchronisations=counted["host_synchronisations"],
                allocations=allocated[(what, rows) != ("step", 1)],
                device=device,
                cache="cold" if self._cold else "warm",
                kv=kv,
                time=None
                if what in DERIVED
                else clock(lambda: engine.step(1, draft), lambda: back(engine), device, self._cold),
            )

        yield case("step", 1, bare, one, whole, False)
        yield case("step", 2, bare, two, two_row, True)
        yield case("kvspn_step", 2, drafting, all_of_it, whole, True)
        yield case("draft", 1, drafting - bare, all_of_it - two, whole, True)
        reached = self._tokens_per_step or _tokens_per_step(fmt, shape.encoder_stride)
        if reached:
            size, flops = (round(each / reached) for each in (drafting, all_of_it))
            token = case("token", 2, size, flops, whole, True)
            token.tokens_per_step = reached
            token.tokens_per_step_of = "given" if self._tokens_per_step else "miniature"
            yield token

    def _expect(
        self,
        made: DecoderWeights,
        stored: DecoderWeights,
        fmt: str,
        shape: Shape,
        kv: str | None,
        device: str,
    ) -> Expected:
        """What is right in a format, computed once for all backends and batches on a device."""
        at = id(made), fmt, shape.length, kv, device
        if at not in self._expected:
            self._expected[at] = Expected(made.to(device), stored.to(device), fmt, shape, kv)
        return self._expected[at]

    def peer_cases(
        self, modules: dict[str, ModuleType], problem: Problem | None, name: str, shape: Shape, fmt: str
    ) -> Iterator[Case]:
        for peer, module in modules.items():
            if problem is None or fmt not in module.FORMATS:
                continue
            self._progress(f"{peer}, {fmt}")
            try:
                yield from _peer_cases(peer, module, problem, name, shape, fmt)
            except Skipped as reason:
                self._skipped(str(reason))

    def time(self, cases: list[Case]) -> None:
        """All of them in turn, round after round."""
        if cases:
            self._progress(f"{cases[0].shape}: timing")
            self._rounds.time(cases)
            self._derive(cases)
            self._rows += [case.row() for case in cases]

    def _derive(self, cases: list[Case]) -> None:
        """The times of cases that follow from others', and the ratios, round by round."""
        of = {(case.backend, case.weights, case.kv, case.what, case.rows): case.times for case in cases}
        for case in cases:
            if case.what not in DERIVED:
                continue
            one, two, whole = (
                of[case.backend, case.weights, case.kv, what, rows]
                for what, rows in (("step", 1), ("step", 2), ("kvspn_step", 2))
            )
            key = _key(case, self._shapes)
            if case.what == "token":
                assert case.tokens_per_step is not None
                self._costs["tokens_per_step"][key] = case.tokens_per_step
                case.times = [ms / case.tokens_per_step for ms in whole]
            else:
                case.times = [a - b for a, b in zip(whole, two, strict=True)]
                self._cost("two_row_cost", key, [b / a for a, b in zip(one, two, strict=True)])
                self._cost("draft_overhead", key, [c / a - 1 for a, c in zip(one, whole, strict=True)])

    def forget(self) -> None:
        """A decoder is done with."""
        self._expected.clear()

    def _cost(self, name: str, key: str, ratios: list[float]) -> None:
        """A ratio of times of one round, in every round."""
        self._costs[name][key] = round(median(ratios), 3)
        interval = of_median(ratios)
        self._intervals[name][key] = interval and [round(each, 3) for each in interval]

    def document(self) -> dict[str, Any]:
        shape, *_ = self._shapes.values()
        machine = self._rounds.machine()
        return {
            "machine": machine,
            "warnings": warnings(self._rows, machine),
            "rows": self._rows,
            "summary": {
                **self._costs,
                "intervals": self._intervals,
                "speedup": speedups(self._rows, self._shapes),
            },
            "draft": {"vocabulary": shape.short_list or None, "encoder_stride": shape.encoder_stride},
        }


def _key(case: Case | Row, shapes: Mapping[str, Shape]) -> str:
    """Under which the summary has it: shape/backend/weights, and caches, batch and length that are others."""
    key = f"{case.shape}/{case.backend}/{case.weights}" + (f"/{case.kv} KV" if case.kv else "")
    batch = f"/batch {case.batch}" if case.batch != 1 else ""
    own = case.kv_length == shapes[case.shape].length
    return key + batch + ("" if own else f"/T {case.kv_length}")


def speedups(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> dict[str, dict[str, Any]]:
    """Of each of kvspn's steps and tokens: the fastest correct peer of the same weight width, and the ratios.

    Each ratio of medians has the interval of the times' ratio beside it, under its name and "_interval". A
    token is compared with a peer's step of one row, which yields one.
    """
    found: dict[str, dict[str, Any]] = {}
    for ours in rows:
        if ours.backend in PEERS or ours.what not in ("step", "token"):
            continue
        token = ours.what == "token"
        count = 1 if token else ours.rows
        peers = [
            row
            for row in rows
            if row.backend in PEERS
            and row.correct
            and (row.rows, row.batch, row.kv_length) == (count, ours.batch, ours.kv_length)
        ]
        compared: dict[str, Any] = {}
        same = [row for row in peers if (row.shape, row.weights) == (ours.shape, _width(ours.weights))]
        if same:
            fastest = min(same, key=lambda row: row.ms_median)
            compared["fastest_peer"] = fastest.backend
            compared |= _over("fastest_peer", ours, fastest)
        unpruned, _ = UNPRUNED.get(ours.shape, (None, None))
        for row in peers:
            if (row.backend, row.weights) == ("transformers", "fp32") and row.shape in (ours.shape, unpruned):
                which = "whisper_medium" if row.shape == unpruned else "transformers"
                compared |= _over(f"{which}_fp32", ours, row)
        if compared:
            what = "token" if token else f"step_{ours.rows}"
            found.setdefault(_key(ours, shapes), {})[what] = compared
    return found


def _over(name: str, ours: Row, theirs: Row) -> dict[str, Any]:
    try:
        found = ratio(ours.ms, theirs.ms)
        interval = [round(found.low, 3), round(found.high, 3)]
    except ValueError:  # too few rounds
        interval = None
    estimate = round(theirs.ms_median / ours.ms_median, 3)
    return {f"over_{name}": estimate, f"over_{name}_interval": interval}


def step_bytes(weights: DecoderWeights, shape: Shape, batch: int, draft: bool, kv: str | None = None) -> int:
    """Weights once, each row's keys and values once; with a draft, its weights and its group reads too."""
    # Each head's int8 values at a position have an fp32 scale.
    each = weights.embed_tokens.element_size() if kv is None else 1 + 4 / shape.head_dim
    cached = round(_cached(shape, weights if draft else None) * each)
    return batch * cached + sum(tensor.nbytes for tensor in _read(weights, draft))


def step_flops(weights: DecoderWeights, shape: Shape, batch: int, rows: int, draft: bool) -> int:
    """Two for each value of a matrix and of a cache, for every query row, and once for a draft.

    Args:
        weights: in a float format.
    """
    base, whole = (
        sum(tensor.numel() for tensor in _read(weights, drafted) if tensor.ndim == 2)
        + _cached(shape, weights if drafted else None)
        for drafted in (False, True)
    )
    return 2 * batch * (rows * base + draft * (whole - base))


def _read(weights: DecoderWeights, draft: bool) -> list[torch.Tensor]:
    """The weights that a step reads."""
    parts: list[Any] = [layer._replace(cross_kv=Linear(weights.embed_tokens[:0])) for layer in weights.layers]
    parts += [(weights.norm, weights.head)]
    if draft:
        parts += [*weights.blocks, (weights.draft_norm, weights.draft_output)]
    return [tensor for part in parts for piece in part if piece for tensor in piece if tensor is not None]


def _cached(shape: Shape, drafting: DecoderWeights | None) -> int:
    """Values of the caches that a step reads for a row, a draft network of some weights too."""
    positions = shape.layers * (shape.length + shape.encoder_positions)
    for i, block in enumerate(drafting.blocks if drafting else ()):
        group = drafting.group(i) if drafting else slice(0)
        positions += (group.stop - group.start) * shape.length
        if block.cross_q is not None:
            positions += -(-shape.encoder_positions // shape.encoder_stride)
    return 2 * positions * shape.width


@cache
def _allocations(
    layers: int, groups: int, backend: str, fmt: str, kv: str | None
) -> tuple[int | None, int | None]:
    return allocations.count(layers, groups, backend, fmt, kv)


def faint_draft(weights: DecoderWeights) -> DecoderWeights:
    """The same decoder with a draft network of next to no cost: a small block, one word to choose from."""
    like = weights.embed_tokens
    block = weights.blocks[0]._replace(
        fc1=Linear(like.new_zeros(16, like.shape[1])),
        fc2=Linear(like.new_zeros(like.shape[1], 16)),
        cross_norm=None,
        cross_q=None,
        cross_out=None,
    )
    return replace(
        weights,
        blocks=(block,),
        groups=1,
        last_layer_only=True,
        draft_head=Linear(like[:1].clone()),
        draft_ids=torch.zeros(1, dtype=torch.int32),
    )


def _peer_cases(
    peer: str, module: ModuleType, problem: Problem, name: str, shape: Shape, fmt: str
) -> Iterator[Case]:
    step = module.prepare(problem, fmt)
    fp32 = step_bytes(problem.weights, replace(shape, length=0, encoder_positions=0), 1, False)
    size = round(fp32 / 32 * FORMATS[fmt].bits) + _cached(shape, None) * module.FORMATS[fmt]
    for rows in module.ROWS:
        _, logits = step(rows)

        def milliseconds(rows: int = rows) -> float:
            taken: float = step(rows)[0]
            return taken

        yield Case(
            what="step",
            shape=name,
            backend=peer,
            weights=fmt,
            batch=1,
            rows=rows,
            kv_length=shape.length,
            bytes=size,
            flops=step_flops(problem.weights, shape, 1, rows, False),
            correct=problem.correct(logits, fmt),
            launches=module.LAUNCHES,
            time=milliseconds,
        )


def miniature(variant: str = "") -> dict[str, Any] | None:
    """The shipped miniature's figures on unseen sentences at k = 1, or a variant's; None without a record.

    Args:
        variant: "last-layer", "int8-int4", ...: bench/results/miniature-<variant>.json.
    """
    record = files("kvspn.measure.records") / f"miniature{'-' * bool(variant)}{variant}.json"
    if not record.is_file():
        return None
    rows: list[dict[str, Any]] = json.loads(record.read_text("utf-8"))["rows"]
    return next(row for row in rows if (row["set"], row["k"]) == ("unseen", 1))


def _tokens_per_step(fmt: str, encoder_stride: int) -> float | None:
    """The miniature's in a weight format, its draft network with that stride; None without a record."""
    stride = f"encoder-stride-{encoder_stride}" if encoder_stride > 1 else ""
    variant = "-".join(part for part in (stride, fmt.replace("/", "-")) if part not in ("", "fp32"))
    figures = miniature(variant)
    return figures["tokens_per_step"] if figures else None


def _width(fmt: str) -> str:
    """The base model's of a format for each network."""
    return base_and_draft(fmt)[0]
