"""Drafts that the caller gives: 0 to 15 of a row, verified in one pass, on every backend."""

import pytest
import torch

from kvspn.decoding.loop import decode
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.weights.random import random_decoder
from support.scripted import VOCABULARY, chain, scripted_decoder

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu.py has it


@pytest.fixture(params=READY)
def backend(request):
    return request.param


def started(backend, weights, prompts, capacity=24, max_length=None, eos=-1, kv=None, **options):
    width = weights.embed_tokens.shape[1]
    e = engine(backend, weights, batch=len(prompts), capacity=capacity, cross_capacity=4, kv=kv)
    states = torch.linspace(-1, 1, 3 * width).view(3, width)
    e.start([states] * len(prompts), prompts, eos=eos, max_length=max_length or capacity, **options)
    return e


def rows(e):
    return [e.tokens[b, : n + 1].tolist() for b, n in enumerate(e.lengths.tolist())]


def drafts(*given):
    """int32 [B, the most of a row], filled up with -1."""
    width = max(map(len, given))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in given], dtype=torch.int32)


def noisy_decoder():
    """Random weights, of a shape that every backend takes, with int8 caches too."""
    return random_decoder(heads=1, head_dim=16, gain=2.5)


LOOP = chain(*range(1, 30))  # 1, 2, ..., 29, then 0


def test_the_longest_right_prefix_stands(backend):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1], [5], [9], [3]])
    e.step(draft_tokens=drafts([2, 3, 4], [6, 9, 8], [1, 11, 12], []))
    assert rows(e) == [[1, 2, 3, 4, 5], [5, 6, 7], [9, 10], [3, 4]]
    assert e.stats.tolist() == [[1, 3, 3], [1, 3, 1], [1, 3, 0], [1, 0, 0]]


def test_fifteen_of_a_row(backend):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1]])
    e.step(draft_tokens=drafts(list(range(2, 17))))
    assert rows(e) == [list(range(1, 18))]
    with pytest.raises(ValueError, match=r"^the number of draft_tokens of a row must be in 0\.\.15, got 16"):
        e.step(draft_tokens=torch.zeros(1, 16, dtype=torch.int32))


@pytest.mark.parametrize("bad", [-1, -(2**31), VOCABULARY, 2**31 - 1])
def test_drafts_end_at_what_is_no_token(backend, bad):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1]])
    e.step(K_INF, draft_tokens=drafts([2, bad, 4]))
    assert rows(e) == [[1, 2, 3]]
    assert e.stats.tolist() == [[1, 1, 1]]


def test_no_drafts_are_a_plain_step(backend):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1]])
    e.step(draft_tokens=torch.zeros(1, 0, dtype=torch.int32))
    assert (rows(e), e.stats.tolist()) == ([[1, 2]], [[1, 0, 0]])


@pytest.mark.parametrize(("max_length", "capacity"), [(4, 24), (4, 4), (5, 5)])
def test_a_limit_cuts_the_drafts(backend, max_length, capacity):
    """Also where the cache has no place for all of them."""
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1]], capacity=capacity, max_length=max_length)
    e.step(draft_tokens=drafts([2, 3, 4, 5, 6, 7]))
    assert rows(e) == [list(range(1, max_length + 1))]
    assert e.finished.all()
    assert e.stats.tolist() == [[1, 6, max_length - 1]]


def test_the_end_token_among_the_drafts(backend):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1]], eos=3)
    e.step(draft_tokens=drafts([2, 3, 4, 5]))
    assert (rows(e), e.finished.tolist(), e.stats.tolist()) == ([[1, 2, 3]], [True], [[1, 4, 2]])


def test_a_draft_may_be_any_of_the_k_best(backend):
    ranked = {1: {2: 9.0, 7: 8.0}, 7: {8: 9.0, 3: 8.0}, 8: {4: 1.0}, 3: {5: 1.0}}
    for k, expected in ((1, [1, 2]), (2, [1, 7, 3, 5])):
        e = started(backend, scripted_decoder(ranked, LOOP), [[1]])
        e.step(k, draft_tokens=drafts([7, 3]))
        assert rows(e) == [expected]


def test_nan_behind_an_accepted_draft(backend):
    weights = scripted_decoder(LOOP, LOOP)
    weights.embed_tokens[3] = torch.nan
    e = started(backend, weights, [[1], [10]])
    with pytest.raises(ValueError, match=r"^the logits of row 0 at position 2 must be numbers"):
        e.step(draft_tokens=drafts([2, 3, 4, 5], [11]))
        e.check()
    assert rows(e) == [[1, 2, 3, -1], [10, 11, 12]]
    assert e.finished.tolist() == [True, False]


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_given_drafts_leave_greedy_tokens_bit_for_bit(backend, kv, seed):
    """Right, half right and random ones, of different numbers: tokens and caches are plain decoding's."""
    weights = noisy_decoder()
    vocabulary, prompts = len(weights.embed_tokens), [[1, 2], [3], [4, 5, 6]]
    plain = started(backend, weights, prompts, kv=kv)
    while not plain.finished.all():
        plain.step(draft=False)
    e = started(backend, weights, prompts, kv=kv)
    generator = torch.Generator().manual_seed(seed)
    while not e.finished.all():
        given = []
        for known, at in zip(rows(plain), e.lengths.tolist(), strict=True):
            guess = known[at + 1 : at + 1 + int(torch.randint(16, (), generator=generator))]
            for i in range(len(guess)):
                if torch.rand((), generator=generator) < 0.1:
                    guess[i] = int(torch.randint(vocabulary, (), generator=generator))
            given.append(guess)
        e.step(draft_tokens=drafts(*given))
    assert rows(e) == rows(plain)
    for b, length in enumerate(plain.lengths.tolist()):
        for cache, expected in ((e.cache.kv, plain.cache.kv), (e.cache.kv_scale, plain.cache.kv_scale)):
            if cache is not None:
                assert torch.equal(cache[:, :, b, :, :length], expected[:, :, b, :, :length])
    assert e.stats[:, 0].sum() < plain.stats[:, 0].sum()


def test_a_row_does_not_feel_the_drafts_of_others(backend):
    weights = noisy_decoder()
    alone = started(backend, weights, [[4, 5, 6]])
    alone.step(2, draft_tokens=drafts([7, 8]))
    e = started(backend, weights, [[1, 2], [4, 5, 6], [3]])
    e.step(2, draft_tokens=drafts(list(range(15)), [7, 8], []))
    length = int(alone.lengths[0])
    assert rows(e)[1] == rows(alone)[0]
    assert torch.equal(e.cache.kv[:, :, 1, :, :length], alone.cache.kv[:, :, 0, :, :length])
    assert e.stats[1].tolist() == alone.stats[0].tolist()


def test_what_cannot_be_given(backend):
    e = started(backend, scripted_decoder(LOOP, LOOP), [[1], [2]])
    for bad, error, message in (
        (torch.zeros(2, 1), TypeError, "draft_tokens must be int32"),
        (torch.zeros(3, 1, dtype=torch.int32), ValueError, "draft_tokens must have shape"),
        (torch.zeros(2, dtype=torch.int32), ValueError, "draft_tokens must have shape"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            e.step(draft_tokens=bad)
    e.step()
    e.step(draft_tokens=drafts([3], [4]))
    assert rows(e) == [[1, 2, 3, 4], [2, 3, 4, 5]]


def test_decoding_by_a_hypothesis(backend):
    """A guess that is right to its middle: fewer steps, the same tokens; then the draft network goes on."""
    weights = scripted_decoder(LOOP, chain(20, 21, 22, 23, 24, 25))
    e = started(backend, weights, [[1], [2]], capacity=20)
    states = torch.ones(2, 3, VOCABULARY)
    options = {"eos": -1, "max_length": 20}
    plain = decode(e, states, [[1], [2]], draft=False, **options)
    guess = [[*range(2, 10), 29, 29, 29, 29], []]
    guided = decode(e, states, [[1], [2]], draft_tokens=guess, **options)
    assert guided.sequences == plain.sequences
    assert guided.rows[0].accepted == 8
    assert guided.rows[0].steps < plain.rows[0].steps
    # One wrong token: it costs a step, and one more until the row is met again.
    once = decode(e, states, [[1], [2]], draft_tokens=[[*range(2, 7), 29, *range(8, 21)], []], **options)
    assert once.sequences == plain.sequences
    assert (once.rows[0].steps, once.rows[0].accepted) == (3, 17)
    with pytest.raises(ValueError, match=r"^draft_tokens must hold 2 rows, got 1"):
        decode(e, states, [[1], [2]], draft_tokens=[[1]], **options)
    with pytest.raises(ValueError, match=r"^every token of draft_tokens\[1\] must be"):
        decode(e, states, [[1], [2]], draft_tokens=[[1], [-1]], **options)
