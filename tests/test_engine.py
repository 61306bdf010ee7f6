import pytest
import torch

from kvspn.engines import backends, engine
from kvspn.weights.formats import quantise
from kvspn.weights.random import random_decoder

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu.py has it


@pytest.fixture(params=READY)
def make_engine(request):
    """An engine maker for each backend that can run here."""

    def make(weights, batch=2, capacity=20, cross_capacity=6, kv=None):
        return engine(
            request.param, weights, batch=batch, capacity=capacity, cross_capacity=cross_capacity, kv=kv
        )

    return make


def start(e, prompt=((1, 2, 3), (4,)), **options):
    states = [torch.randn(5, 16), torch.randn(2, 16)]
    e.start(states, prompt, **({"eos": -1, "max_length": 20} | options))


def state(e):
    return {name: getattr(e, name).clone() for name in ("tokens", "lengths", "finished", "stats")}


def test_start(make_engine):
    e = make_engine(random_decoder())
    assert e.finished.all()
    start(e)
    assert e.lengths.tolist() == [2, 0]
    assert e.tokens[0, :3].tolist() == [1, 2, 3]
    assert e.tokens[1, 0] == 4
    assert not e.finished.any()
    assert not e.stats.any()


@pytest.mark.parametrize("count", [2, 17, 18, 33, 37])
def test_a_prompt_of_many_chunks_equals_steps(make_engine, count):
    """A prompt processed in chunks, the last of one token too, leaves the state that generating it would."""
    weights = random_decoder(positions=40)
    e, states = make_engine(weights, batch=1, capacity=40), [torch.randn(4, 16)]
    e.start(states, [[5]], eos=-1, max_length=40)
    while e.lengths[0] < count:
        e.step(draft=False)
    tokens, kv = e.tokens.clone(), e.cache.kv[..., : count - 1, :].clone()
    e.cache.kv.fill_(torch.nan)
    e.start(states, [tokens[0, :count].tolist()], eos=-1, max_length=40)
    assert e.lengths.tolist() == [count - 1]
    assert torch.equal(e.cache.kv[..., : count - 1, :], kv)
    e.step(draft=False)
    assert e.tokens[0, count] == tokens[0, count]


def processed(e):
    """Of each prefill the row, where it begins and where it ends."""
    done, prefill = [], e._prefill
    e._prefill = lambda row, first, count, position: (
        done.append((row, first, count)),
        prefill(row, first, count, position),
    )
    return done


def test_what_prompts_begin_with_alike_stays_with_the_states(make_engine):
    """Bit for bit what processing it anew leaves, whatever was decoded in between."""
    weights = random_decoder(positions=40)
    e, fresh = (make_engine(weights, capacity=40) for _ in range(2))
    states = [torch.randn(4, 16), torch.randn(6, 16)]
    long = [(7 * i) % 29 for i in range(37)]
    e.start(states, [long[:20], [4]], eos=-1, max_length=40)
    done = processed(e)
    for prompts, begin in (
        ([long, [4, 5]], (19, 0)),  # longer
        ([[*long[:18], 28, 1], [4, 5, 6]], (18, 1)),  # another ending
        ([long[:18], [5, 5]], (17, 0)),  # shorter; and another beginning
        ([long, [5, 5]], (17, 1)),
    ):
        for _ in range(2):
            e.step()
        done.clear()
        e.start(None, prompts, eos=-1, max_length=40)
        assert done == [(row, begin[row], len(prompts[row]) - 1) for row in range(2)]
        fresh.start(states, prompts, eos=-1, max_length=40)
        for row, ids in enumerate(prompts):
            kept = (..., slice(len(ids) - 1), slice(None))
            assert torch.equal(e.cache.kv[:, :, row][kept], fresh.cache.kv[:, :, row][kept])
        e.step()
        fresh.step()
        assert e.tokens[0, : e.lengths[0] + 1].tolist() == fresh.tokens[0, : fresh.lengths[0] + 1].tolist()
    done.clear()
    e.start(states, prompts, eos=-1, max_length=40)  # the same states, but who knows
    assert [first for _, first, _ in done] == [0, 0]
    done.clear()
    e.start(None, prompts, eos=-1, max_length=40, cross_queries=True)  # which were not kept so far
    e.start(None, prompts, eos=-1, max_length=40, cross_queries=True)
    assert [first for _, first, _ in done] == [0, 0, 36, 1]


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_logits_behind_a_token_of_the_prompt(make_engine, storage):
    """Those that a step has at that token; the position is in the first, a middle or the last pass."""
    weights = quantise(random_decoder(positions=40), storage)
    e, states = make_engine(weights, capacity=40), [torch.randn(4, 16), torch.randn(6, 16)]
    prompts = [[(7 * i) % 29 for i in range(37)], [4, 5]]
    e.start(states, prompts, eos=-1, max_length=40)
    done = processed(e)
    for positions in ([0, 0], [15, None], [16, 0], [35, 0], [20, 0]):
        e.start(None, prompts, eos=-1, max_length=40, logits_at=positions)
        found = e.logits.clone()
        cut = [ids if at is None else ids[: at + 1] for ids, at in zip(prompts, positions, strict=True)]
        e.start(None, cut, eos=-1, max_length=40, log_probs=True)
        e.step(draft=False)
        for row, at in enumerate(positions):
            if at is None:
                continue
            token = e.tokens[row, at + 1]
            assert token == found[row].argmax()
            torch.testing.assert_close(
                found[row].log_softmax(0)[token], e.log_probs[row, at + 1], rtol=1e-4, atol=1e-5
            )
    e.start(None, prompts, eos=-1, max_length=40)
    e.start(None, prompts, eos=-1, max_length=40, logits_at=[35, None])
    assert done[-2:] == [(0, 35, 36), (1, 1, 1)]  # No more than that token is processed again.


def test_int8_caches(make_engine):
    """k = 1 gives the greedy tokens, and they are those of fp32 caches where the model is sure."""
    weights = random_decoder(heads=1, head_dim=16, gain=3.0)
    runs = {}
    for kv, draft in ((None, True), ("int8", True), ("int8", False)):
        torch.manual_seed(0)
        e = make_engine(weights, kv=kv)
        start(e)
        while not e.finished.all():
            e.step(draft=draft)
        runs[kv, draft] = e.tokens.tolist()
    assert e.cache.kv.dtype == e.cache.cross_kv.dtype == torch.int8
    assert runs["int8", True] == runs["int8", False] == runs[None, True]


def test_addresses_never_change(make_engine):
    e = make_engine(random_decoder())
    buffers = ("tokens", "lengths", "finished", "stats")
    before = [getattr(e, name).data_ptr() for name in buffers]
    for _ in range(2):
        start(e)
        for k in (1, 3, 2**31 - 1):
            e.step(k)
    assert [getattr(e, name).data_ptr() for name in buffers] == before


def test_a_second_start_forgets_the_first(make_engine):
    e = make_engine(random_decoder())
    states = [torch.randn(5, 16), torch.randn(2, 16)]
    runs = []
    for _ in range(2):
        e.start(states, [[1, 2, 3], [4]], eos=3, max_length=12)
        while not e.finished.all():
            e.step()
        runs.append([e.tokens[b, : e.lengths[b] + 1].tolist() for b in range(2)])
        start(e, prompt=[[7], [8, 9]])
        e.step()
    assert runs[0] == runs[1]


def test_the_encoder_states_of_a_row_alone(make_engine, dtype):
    """Cross-attention keys and values do not depend on the other rows; a padded tensor's rows will do."""
    weights = random_decoder(dtype=dtype)
    states, e = torch.randn(2, 6, 16).to(dtype), make_engine(weights)
    e.start(states, [[1], [2]], eos=-1, max_length=20)
    together = e.cache.cross_kv.clone()
    for b in range(2):
        alone = make_engine(weights, batch=1)
        alone.start(states[b : b + 1], [[1]], eos=-1, max_length=20)
        assert torch.equal(alone.cache.cross_kv[:, :, 0], together[:, :, b])


def test_states_of_several_rows_are_encoded_once(make_engine):
    e = make_engine(random_decoder(heads=1, head_dim=16), batch=3, kv="int8")
    states = torch.randn(5, 16)
    encoded, encode = [], e._encode
    e._encode = lambda row, states: (encoded.append(row), encode(row, states))
    e.start([states, torch.randn(2, 16), states], [[1, 2]] * 3, eos=-1, max_length=9)
    assert encoded == [0, 1]
    assert e.cache.cross_lengths.tolist() == [5, 2, 5]
    for _ in range(3):
        e.step()
    assert e.tokens[0, : e.lengths[0] + 1].tolist() == e.tokens[2, : e.lengths[2] + 1].tolist()
    assert torch.equal(e.cache.cross_kv[:, :, 0, :, :5], e.cache.cross_kv[:, :, 2, :, :5])
    assert torch.equal(e.cache.cross_kv_scale[:, :, 0, :, :5], e.cache.cross_kv_scale[:, :, 2, :, :5])
    e.start(torch.randn(3, 5, 16), [[1]] * 3, eos=-1, max_length=9)  # a tensor's rows are others, each
    assert encoded == [0, 1, 0, 1, 2]


def test_run_is_many_steps(make_engine):
    """It ends with the last row, makes the first token as step() does, and tells what it made."""
    e, only = make_engine(random_decoder()), torch.full((29,), -torch.inf)
    only[7] = 0
    runs = []
    for steps in (1, 30):
        torch.manual_seed(1)
        start(e, begin_mask=only, eos=5)
        while not e.finished.all():
            e.run(steps=steps)
        runs.append(state(e))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert runs[1]["tokens"][0, 3] == 7
    if hasattr(e, "progress"):
        for row, prompt in enumerate((3, 1)):
            assert e.progress(row) == e.tokens[row, prompt : e.lengths[row] + 1].tolist()
    start(e)
    e.run(steps=0)
    assert not e.stats.any()


def test_begin_mask_is_for_the_first_token(make_engine):
    e = make_engine(random_decoder())
    only = torch.full((29,), -torch.inf)
    only[7] = 0
    mask = torch.zeros(29)
    mask[7] = -torch.inf
    start(e, begin_mask=only)
    e.step()
    assert (e.tokens[0, 3], e.tokens[1, 1]) == (7, 7)
    assert e.stats.tolist() == [[1, 1, 1], [1, 1, 1]]  # The draft network can guess no other.
    start(e, mask=mask)
    for _ in range(6):
        e.step(k=2**31 - 1)
    assert 7 not in e.tokens


def test_a_full_prompt_is_finished(make_engine):
    e = make_engine(random_decoder())
    start(e, max_length=3)
    assert e.finished.tolist() == [True, False]
    before = state(e)
    e.step()
    after = state(e)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert after["lengths"][1] > 0


def test_parameters_and_inference_mode(make_engine):
    """Weights may be Parameters; an engine made or used in inference mode works outside of it."""
    weights = random_decoder()
    weights.embed_tokens.requires_grad_()
    with torch.inference_mode():
        e = make_engine(weights)
        start(e)
        e.step()
    start(e)
    e.step()
    assert not e.cache.kv.requires_grad


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("name", {"name": "cublas"}),
        ("weights", {"weights": []}),
        ("batch", {"batch": 0}),
        ("capacity", {"capacity": 25}),
        ("cross_capacity", {"cross_capacity": 0}),
        ("kv", {"kv": "int4"}),
    ],
)
def test_engine_errors_name_the_argument(name, options):
    arguments = {
        "name": "reference",
        "weights": random_decoder(),
        "batch": 1,
        "capacity": 9,
        "cross_capacity": 9,
    }
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*, got "):
        engine(**(arguments | options))


def test_a_missing_backend_hears_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"reference.*got 'triton'.*triton: (no GPU|triton is not)"):
        engine("triton", random_decoder(), batch=1, capacity=9, cross_capacity=9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("encoder_states", {"encoder_states": [torch.zeros(5, 16)]}),
        ("encoder_states[0]", {"encoder_states": torch.zeros(2, 5, 8)}),
        ("encoder_states[1]", {"encoder_states": [torch.zeros(5, 16), None]}),
        ("the number of encoder_states[0]", {"encoder_states": torch.zeros(2, 7, 16)}),
        ("the number of encoder_states[0]", {"encoder_states": torch.zeros(2, 0, 16)}),
        ("prompt", {"prompt": [[1]]}),
        ("the number of tokens in prompt[1]", {"prompt": [[1], []]}),
        ("the number of tokens in prompt[0]", {"prompt": [[1] * 13, [1]]}),
        ("every token of prompt[0]", {"prompt": [[29], [1]]}),
        ("every token of prompt[1]", {"prompt": [[2], [-1]]}),
        ("every token of prompt[1]", {"prompt": [[2], ["a"]]}),
        ("eos", {"eos": -2}),
        ("max_length", {"max_length": 21}),
        ("mask", {"mask": torch.zeros(28)}),
        ("begin_mask", {"begin_mask": torch.zeros(29, dtype=torch.bool)}),
        ("logits_at", {"logits_at": [0]}),
        ("logits_at[1]", {"logits_at": [None, 0]}),  # the newest token
        ("logits_at[0]", {"prompt": [[1, 2], [3]], "logits_at": [-1, None]}),
        ("logits_at[0]", {"prompt": [[1, 2], [3]], "logits_at": ["0", None]}),
    ],
)
def test_start_errors_name_the_argument(make_engine, name, options):
    e = make_engine(random_decoder())
    start(e)
    e.step()
    before = state(e)
    arguments = {"encoder_states": torch.zeros(2, 5, 16), "prompt": [[1], [2]], "eos": 3, "max_length": 12}
    with pytest.raises((TypeError, ValueError)) as caught:
        e.start(**(arguments | options))
    assert str(caught.value).startswith(f"{name} must ")
    assert all(torch.equal(before[name], value) for name, value in state(e).items())


@pytest.mark.parametrize(
    ("name", "options"), [("k", {"k": 0}), ("k", {"k": 1.5}), ("draft", {"k": 1, "draft": True})]
)
def test_step_errors_name_the_argument(make_engine, name, options):
    e = make_engine(random_decoder(blocks=0))
    start(e)
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*, got "):
        e.step(**options)
