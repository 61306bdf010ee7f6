"""The laws of the loop: k = 1 is greedy to the last bit, k = inf accepts all, rows are independent."""

import importlib
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvspn.decoding import DecodeStats, decode, parse_k
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.weights import DecoderWeights
from kvspn.weights.random import random_decoder

step_module = importlib.import_module("kvspn.ops.decoder_step")  # the package's name for it is the op

READY = [name for name, missing in backends().items() if missing is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARY, WIDTH, MAX_LENGTH = 29, 16, 14


@dataclass
class Task:
    """A random model and a random batch for it."""

    weights: DecoderWeights
    states: list[torch.Tensor]
    prompt: list[list[int]]
    options: dict

    def decode(self, backend="reference", rows=slice(None), poison=True, **options):
        """The result, and each row's cache up to its length."""
        states, prompt = self.states[rows], self.prompt[rows]
        e = engine(backend, self.weights, batch=len(prompt), capacity=MAX_LENGTH, cross_capacity=7)
        if poison:
            e.cache.kv.fill_(torch.nan)
            e.cache.cross_kv.fill_(torch.nan)
        result = decode(e, states, prompt, **self.options, **options)
        caches = [e.cache.kv[:, :, b, :, :n].clone() for b, n in enumerate(e.lengths.tolist())]
        return result, caches


@st.composite
def tasks(draw):
    layers = draw(st.sampled_from([1, 2, 4]))
    blocks = draw(st.sampled_from([b for b in (1, 2, 4) if b <= layers]))
    weights = random_decoder(
        layers=layers,
        blocks=blocks,
        vocabulary=VOCABULARY,
        encoder_attention=draw(st.booleans()),
        last_layer_only=draw(st.booleans()),
        encoder_stride=draw(st.sampled_from([1, 2, 100])),
        short_list=draw(st.sampled_from([0, 12])),
        quantised=draw(st.sampled_from([None, "fp8", "int8", "int4"])),
        gain=draw(st.sampled_from([0.5, 1.5, 3.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )
    token = st.integers(0, VOCABULARY - 1)
    prompt = draw(st.lists(st.lists(token, min_size=1, max_size=MAX_LENGTH), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    states = [torch.randn(draw(st.integers(1, 7)), WIDTH, generator=generator) for _ in prompt]

    def mask():
        values = torch.randn(VOCABULARY, generator=generator)
        return values.masked_fill(torch.rand(VOCABULARY, generator=generator) < 0.4, -torch.inf)

    options = {
        "eos": draw(st.sampled_from([-1, 3])),
        "max_length": draw(st.integers(max(map(len, prompt)), MAX_LENGTH)),
        "mask": mask() if draw(st.booleans()) else None,
        "begin_mask": mask() if draw(st.booleans()) else None,
    }
    return Task(weights, states, prompt, options)


def assert_same(actual, expected):
    (result, caches), (other, others) = actual, expected
    assert result.sequences == other.sequences
    assert all(map(torch.equal, caches, others))


@pytest.mark.parametrize("backend", READY)
def test_k_1_is_greedy_and_rows_are_independent(backend):
    @settings(max_examples=12 if backend == "cuda" else 50, deadline=None)
    @given(task=tasks())
    def holds(task):
        greedy = task.decode(backend, draft=False)
        speculative = task.decode(backend, draft=True, k=1)
        assert_same(speculative, greedy)
        for b in range(len(task.prompt)):
            row = slice(b, b + 1)
            for together, draft in ((greedy, False), (speculative, True)):
                alone, cache = task.decode(backend, rows=row, draft=draft)
                assert_same((alone, cache), (DecodeRow(together[0], b), together[1][row]))
                assert counts(alone.rows[0]) == counts(together[0].rows[b])
        for b, sequence in enumerate(greedy[0].sequences):
            assert sequence[: len(task.prompt[b])] == task.prompt[b]
            new = sequence[len(task.prompt[b]) :]
            assert len(sequence) <= task.options["max_length"]
            assert 3 not in new[:-1] or task.options["eos"] != 3
            assert len(sequence) == task.options["max_length"] or new[-1] == task.options["eos"]
            for name, masked in (("mask", new), ("begin_mask", new[:1])):
                mask = task.options[name]
                assert mask is None or all(mask[token] > -torch.inf for token in masked)

    holds()


@pytest.mark.parametrize("backend", READY)
def test_faults_limits_and_ends_are_a_rows_own(backend):
    """Several end tokens, a limit for each row: the tokens up to there, whatever the neighbours."""

    @settings(max_examples=6 if backend == "cuda" else 25, deadline=None)
    @given(task=tasks(), data=st.data())
    def holds(task, data):
        ends = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4))
        limits = [data.draw(st.integers(len(ids), MAX_LENGTH)) for ids in task.prompt]
        endless = {**task.options, "eos": -1, "max_length": MAX_LENGTH}
        own = {**task.options, "eos": ends, "max_length": limits}
        for how in ({"draft": False}, {"k": 1}, {"k": math.inf}):  # the last takes steps of two tokens
            whole, _ = Task(task.weights, task.states, task.prompt, endless).decode(backend, **how)
            together, _ = Task(task.weights, task.states, task.prompt, own).decode(backend, **how)
            for b, (tokens, ids, limit) in enumerate(zip(whole.sequences, task.prompt, limits, strict=True)):
                stop = next((i + 1 for i in range(len(ids), limit) if tokens[i] in ends), limit)
                assert together.sequences[b] == tokens[:stop]
                alone, _ = Task(task.weights, task.states, task.prompt, {**own, "max_length": limit}).decode(
                    backend, rows=slice(b, b + 1), **how
                )
                assert alone.sequences[0] == together.sequences[b]
                assert counts(alone.rows[0]) == counts(together.rows[b])

    holds()


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ({"eos": []}, "eos must hold at least one token"),
        ({"eos": [3, -2]}, "eos must be in -1"),
        ({"max_length": [9, 9]}, "max_length must be one for all rows or 3, got 2"),
        ({"max_length": [9, 9, 2]}, r"the number of tokens in prompt\[2\] must be in 1..2, got 3"),
        ({"max_length": [9, 9, MAX_LENGTH + 1]}, "max_length must be in 1"),
    ],
)
def test_bad_stops(stops, message):
    t = task()
    t.options |= stops
    with pytest.raises(ValueError, match=f"^{message}"):
        t.decode()


class DecodeRow:
    """One row of a batch's result."""

    def __init__(self, result, b):
        self.sequences = [result.sequences[b]]


def counts(stats):
    return stats.tokens, stats.steps, stats.drafted, stats.accepted


@pytest.mark.parametrize("backend", READY)
@settings(max_examples=15, deadline=None)
@given(task=tasks())
def test_k_inf_accepts_all(backend, task):
    result, _ = task.decode(backend, k=math.inf)
    for row in result.rows:
        assert row.accepted == row.drafted
        assert row.steps == (row.tokens + 1) // 2


@settings(max_examples=50, deadline=None)
@given(task=tasks(), hits=st.lists(st.booleans(), min_size=40, max_size=40))
def test_forced_rejections(task, hits):
    """Whatever the drafts, right or wrong in any order: the tokens are greedy's, and the right ones count."""
    greedy, caches = task.decode(draft=False)
    task = Task(task.weights, task.states[:1], task.prompt[:1], task.options)
    known, accepted, drafted = greedy.sequences[0], [], []

    def propose(w, newest, state, *_):
        after = int(state.caches.lengths) + 1
        right = known[after] if after < len(known) else 0
        hit = hits[len(drafted)]
        drafted.append(hit)
        if hit and after < len(known):
            accepted.append(hit)
        return newest.new_tensor([[right if hit else (right + 1) % VOCABULARY]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "propose", propose)
        result, cache = task.decode(k=1)
    assert_same((result, cache), (DecodeRow(greedy, 0), caches[:1]))
    assert (result.rows[0].drafted, result.rows[0].accepted) == (len(drafted), len(accepted))


def task(blocks=1):
    weights = random_decoder(vocabulary=VOCABULARY, blocks=blocks, gain=2.5)
    prompt = [[1, 2], [3], [4, 5, 6]]
    return Task(
        weights, [torch.randn(4, WIDTH) for _ in prompt], prompt, {"eos": 3, "max_length": MAX_LENGTH}
    )


def test_larger_k_accepts_more():
    accepted = [task().decode(k=k)[0].total.acceptance for k in (1, VOCABULARY // 2, VOCABULARY, "inf")]
    assert accepted[0] <= accepted[1] <= accepted[2] == accepted[3] == 1


def test_thread_invariance(set_threads):
    t = task()
    set_threads(1)
    single = t.decode(k=1)
    set_threads(2)
    assert_same(t.decode(k=1), single)


def test_streaming():
    """Each step's new tokens of each row, in order; together the whole answer."""
    t, heard = task(), [[], [], []]
    chunks = []

    def streamer(row, ids):
        heard[row] += ids
        chunks.append(len(ids))

    result, _ = t.decode(k=3, streamer=streamer)
    assert [p + h for p, h in zip(t.prompt, heard, strict=True)] == result.sequences
    assert set(chunks) <= {1, 2}
    assert all(isinstance(token, int) for ids in heard for token in ids)


def test_statistics():
    result, _ = task().decode(k=2)
    assert result.total.tokens == sum(map(len, result.sequences)) - 6
    for name in ("tokens", "steps", "drafted", "accepted"):
        assert getattr(result.total, name) == sum(getattr(row, name) for row in result.rows)
    assert result.total.seconds == max(row.seconds for row in result.rows) > 0
    for row in result.rows:
        assert 0 <= row.tokens - row.steps - row.accepted + 1 <= 1  # the last step may emit a draft alone
    stats = DecodeStats(tokens=30, steps=20, drafted=16, accepted=12, seconds=0.6)
    assert (stats.acceptance, stats.tokens_per_step) == (0.75, 1.5)
    assert stats.alpt_ms == pytest.approx(20)
    nothing = DecodeStats.total([], 0.0)
    assert (nothing.acceptance, nothing.tokens_per_step, nothing.alpt_ms) == (0, 0, 0)


def test_nothing_to_generate():
    t = task()
    t.options["max_length"] = 3
    t.prompt = [[1, 2, 3]] * 3
    result, _ = t.decode()
    assert result.sequences == t.prompt
    assert counts(result.total) == (0, 0, 0, 0)


@pytest.mark.parametrize(("k", "expected"), [(1, 1), (7, 7), (math.inf, K_INF), ("inf", K_INF)])
def test_parse_k(k, expected):
    assert parse_k(k) == expected


@pytest.mark.parametrize("k", [0, -1, 1.5, "2", None, True, math.nan, -math.inf])
def test_a_bad_k(k):
    with pytest.raises((TypeError, ValueError), match=r"^k must .*, got "):
        task().decode(k=k)


def test_a_draft_without_a_draft_network():
    with pytest.raises(ValueError, match=r"^draft must be False"):
        task(blocks=0).decode(draft=True)
    assert task(blocks=0).decode(draft=False)[0].total.drafted == 0
