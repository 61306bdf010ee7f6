"""Acceptance, masks, stops and statistics of every engine, on decoders whose tokens are known in advance.

Each test fails for one of the mutations in tests/mutations.
"""

import pytest
import torch

from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from support.scripted import VOCABULARY, chain, scripted_decoder

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu.py has it


@pytest.fixture(params=READY)
def start(request, monkeypatch, set_threads):
    """start(weights, prompts, ...): an engine of four threads, if it has any, with the utterances begun."""
    if request.param == "native":
        monkeypatch.setattr("kvspn.engines.native.default_threads", lambda: 4)
        set_threads(4)

    def made(weights, prompts, eos=-1, max_length=20, capacity=20, **options):
        sizes = {"batch": len(prompts), "capacity": capacity, "cross_capacity": 4}
        e = engine(request.param, weights, **sizes)
        e.start(torch.ones(len(prompts), 3, VOCABULARY), prompts, eos=eos, max_length=max_length, **options)
        return e

    return made


def rows(e):
    """Each row's tokens."""
    return [e.tokens[b, : n + 1].tolist() for b, n in enumerate(e.lengths.tolist())]


def mask(**logits: float):
    """fp32 [V] from t7=-inf, ..."""
    values = torch.zeros(VOCABULARY)
    for name, value in logits.items():
        values[int(name[1:])] = value
    return values


def test_the_end_token_as_a_draft_and_as_the_choice_behind_it(start):
    weights = scripted_decoder(chain(1, 2, 3, 4, 5), chain(1, 2, 3, 4, 5))
    e = start(weights, [[1], [2], [3]], eos=3)
    e.step()
    assert rows(e) == [[1, 2, 3], [2, 3], [3, 4, 5]]
    assert e.finished.tolist() == [True, True, False]
    assert e.stats.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_the_end_token_in_place_of_a_rejected_draft(start):
    e = start(scripted_decoder(chain(1, 2, 3), chain(1, 9, 9)), [[1]], eos=2)
    e.step()
    assert (rows(e), e.finished.tolist(), e.stats.tolist()) == ([[1, 2]], [True], [[1, 1, 0]])


@pytest.mark.parametrize(("max_length", "steps", "accepted"), [(2, 1, 1), (3, 1, 1), (4, 2, 2), (5, 2, 2)])
def test_the_length_stop(start, max_length, steps, accepted):
    """To the token, whichever of a step's two it cuts; a draft that was emitted counts."""
    loop = chain(1, 2, 3, 1)
    e = start(scripted_decoder(loop, loop), [[1]], max_length=max_length)
    for _ in range(steps):
        assert not e.finished.any()
        e.step()
    assert rows(e) == [[1, 2, 3, 1, 2, 3][:max_length]]
    assert e.finished.all()
    assert e.stats.tolist() == [[steps, steps, accepted]]


def test_a_full_cache_takes_no_draft(start):
    """A row that is made to go on where nothing fits ends as it is."""
    loop = chain(1, 2, 3, 1)
    e = start(scripted_decoder(loop, loop), [[1]], max_length=6, capacity=6)
    while not e.finished.all():
        e.step()
    before, stats = rows(e), e.stats.clone()
    e.finished.fill_(False)
    e.step(K_INF)
    assert (rows(e), e.finished.tolist()) == (before, [True])
    assert (e.stats - stats).tolist() == [[1, 1, 0]]


def test_equal_logits_of_different_threads(start):
    """The smallest id is chosen, and stands in front of an equal draft."""
    tied = {1: {3: 1.0, 20: 1.0, 40: 1.0, 60: 1.0}}
    for k, expected in ((1, [1, 3]), (2, [1, 3]), (3, [1, 40, 0])):
        e = start(scripted_decoder(tied, {1: {40: 1.0}}), [[1]])
        e.step(k)
        assert rows(e) == [expected]


def test_tokens_in_front_of_the_draft_are_counted_in_every_thread(start):
    ranked = {1: {2: 9.0, 18: 8.0, 34: 7.0, 50: 6.0, 51: 5.0}}
    for k, expected in ((1, [1, 2]), (4, [1, 2]), (5, [1, 51, 0])):
        e = start(scripted_decoder(ranked, {1: {51: 1.0}}), [[1]])
        e.step(k)
        assert rows(e) == [expected]


def test_the_mask_is_added_to_the_drafts_own_logit(start):
    """The draft network likes 5 whatever the mask says; of the base model's it is then the second."""
    weights = scripted_decoder({1: {5: 10.0, 6: 9.0}}, {1: {5: 100.0}})
    e = start(weights, [[1]], mask=mask(t5=-5.0))
    e.step(1)
    assert rows(e) == [[1, 6]]
    e = start(weights, [[1]], mask=mask(t5=-5.0))
    e.step(2)
    assert rows(e) == [[1, 5, 0]]


def test_the_mask_of_a_draft_vocabulary_goes_by_token(start):
    """And not by the place in the list, whichever of the two is forbidden."""
    listed = torch.tensor([2, 5, 7, 9], dtype=torch.int32)
    weights = scripted_decoder({1: {7: 3.0, 5: 2.0}}, {1: {7: 3.0, 5: 2.0}}, listed)
    for forbidden, draft in (("t2", 7), ("t7", 5)):  # 7 is at place 2 of the list
        e = start(weights, [[1]], mask=mask(**{forbidden: -torch.inf}))
        e.step(K_INF)
        assert rows(e) == [[1, draft, 0]]
        assert e.stats.tolist() == [[1, 1, 1]]


def test_a_draft_network_without_a_choice_drafts_nothing(start):
    """Every token of its vocabulary is forbidden: the base model's own choice stands, for any k."""
    listed = torch.tensor([2, 5, 7, 9], dtype=torch.int32)
    weights = scripted_decoder(chain(1, 30, 31), chain(1, 2), listed)
    forbidden = mask(**{f"t{token}": -torch.inf for token in listed.tolist()})
    e = start(weights, [[1]], mask=forbidden)
    e.step(K_INF)
    assert (rows(e), e.stats.tolist()) == ([[1, 30]], [[1, 0, 0]])


def test_statistics_of_rows_that_go_their_own_ways(start):
    """Right, wrong, and ended."""
    e = start(scripted_decoder(chain(1, 2, 3, 4, 5, 6), chain(1, 2, 3, 9, 9)), [[1], [3], [6]], eos=2)
    e.step()
    assert rows(e) == [[1, 2], [3, 4], [6, 0, 0]]
    e.step()
    assert rows(e) == [[1, 2], [3, 4, 5], [6, 0, 0, 0, 0]]
    assert e.stats.tolist() == [[1, 1, 1], [2, 2, 0], [2, 2, 2]]


def nan_after(token: int):
    """A chain in which what follows one token is NaN."""
    weights = scripted_decoder(chain(1, 2, 3, 4, 5, 6, 7, 8), chain(1, 2, 3, 4, 5, 6, 7, 8))
    weights.embed_tokens[token] = torch.nan
    return weights


def step_and_check(e, *arguments, **options):
    """What a step raises itself, or leaves for a check."""
    e.step(*arguments, **options)
    e.check()


@pytest.mark.parametrize("draft", [False, True])
def test_faults_nan_logits_end_their_row(start, draft):
    """The error names row and position, the newest token is -1; the other row goes its way."""
    e = start(nan_after(3), [[5], [1]], max_length=5)
    e.check()
    message = (
        r"^the logits of row 1 at position 2 must be numbers, one of them above -inf, got NaN or -inf alone"
    )
    with pytest.raises(ValueError, match=message):
        for _ in range(3):
            step_and_check(e, draft=draft)
    assert e.tokens[1, : e.lengths[1] + 1].tolist() == [1, 2, 3, -1]
    assert e.finished.tolist()[1]
    stats = e.stats[1].tolist()
    while not e.finished.all():
        e.step(draft=draft)
    assert rows(e)[0] == [5, 6, 7, 8, 0]
    assert e.stats[1].tolist() == stats
    e.start(torch.ones(2, 3, VOCABULARY), [[5], [6]], eos=-1, max_length=5)
    step_and_check(e)


def test_faults_one_nan_among_the_logits(start):
    """Is enough, for a draft that would stand, too: the rest of the row means nothing."""
    weights = scripted_decoder(chain(1, 2, 3), chain(1, 2, 3))
    weights.head.weight[50] = torch.nan
    e = start(weights, [[1]])
    with pytest.raises(
        ValueError, match=r"^the logits of row 0 at position 0 must be numbers, one of them above"
    ):
        step_and_check(e, K_INF)
    assert rows(e) == [[1, -1]]


def test_faults_everything_forbidden(start):
    e = start(scripted_decoder(chain(1, 2), chain(1, 2)), [[1]], mask=torch.full((VOCABULARY,), -torch.inf))
    with pytest.raises(
        ValueError, match=r"^the logits of row 0 at position 0 must be numbers, one of them above"
    ):
        step_and_check(e, K_INF)
    assert rows(e) == [[1, -1]]


def test_faults_nan_in_the_draft_network_drafts_nothing(start):
    weights = scripted_decoder(chain(1, 2, 3), chain(1, 2, 3))
    weights.draft_norm.bias.fill_(torch.nan)
    e = start(weights, [[1]])
    step_and_check(e, K_INF)
    assert (rows(e), e.stats.tolist()) == ([[1, 2]], [[1, 0, 0]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_faults_states_and_masks_that_are_no_numbers(start, value):
    e = start(scripted_decoder(chain(1, 2)), [[1], [2]])
    states = torch.ones(2, 3, VOCABULARY)
    states[1, 2, 5] = value
    with pytest.raises(ValueError, match=r"^encoder_states\[1\] must be finite, got -?(nan|inf) at \[2, 5\]"):
        e.start(states, [[1], [2]], eos=-1, max_length=9)
    if value == -torch.inf:
        return
    for name in ("mask", "begin_mask"):
        with pytest.raises(ValueError, match=rf"^{name} must hold finite numbers or -inf, got NaN or inf"):
            e.start(torch.ones(2, 3, VOCABULARY), [[1], [2]], eos=-1, max_length=9, **{name: mask(t3=value)})
