"""What tokens listen to, from the passes that decoded them: held to transformers' cross-attention."""

import pytest
import torch

from kvspn.decoding import decode
from kvspn.engines import backends, engine
from kvspn.engines.cache import StepCache
from kvspn.engines.reference import ReferenceEngine
from kvspn.models import convert_whisper
from kvspn.models.weights import decoder_weights
from kvspn.weights.random import random_decoder
from support import tiny

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu_cuda.py has it
CAPACITY = 12
HEADS = [(0, 1), (2, 0), (3, 1)]


@pytest.fixture(params=READY)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def whisper():
    """A random Whisper with untrained draft network, and encoder states of two rows, the second shorter."""
    model = tiny.whisper(tiny.tokenizer(), target_positions=CAPACITY)
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    return model, convert_whisper(model, range(4), kvspn_groups=2, kvspn_blocks=2), [states, states[:29]]


def decoded(model, states, backend, kv=None, **options):
    e = model.engine(2, 40, backend, kv=kv)
    prompts = [[3, 4, 5], [3]]
    settings = {"eos": -1, "max_length": [CAPACITY, CAPACITY - 5], "cross_queries": True} | options
    return e, decode(e, states, prompts, **settings).sequences


@pytest.mark.parametrize(("stride", "options"), [(1, {"draft": False}), (3, {"k": 1}), (1, {"k": "inf"})])
def test_the_scores_are_those_of_transformers(whisper, backend, stride, options):
    theirs, model, states = whisper
    model.config.kvspn_encoder_stride = stride
    e, sequences = decoded(model, states, backend, **options)
    model.config.kvspn_encoder_stride = 1
    theirs.set_attn_implementation("eager")
    for row, tokens in enumerate(sequences):
        positions = list(range(len(tokens) - 1))
        found = e.cross_scores(row, HEADS, positions)
        assert found.shape == (3, len(positions), len(states[row]))
        with torch.no_grad():
            output = theirs.model.decoder(
                torch.tensor([tokens[:-1]]), encoder_hidden_states=states[row][None], output_attentions=True
            )
        wanted = torch.stack([output.cross_attentions[layer][0, head] for layer, head in HEADS])
        torch.testing.assert_close(found.softmax(-1), wanted, atol=2e-5, rtol=2e-4)
        assert torch.equal(e.cross_scores(row, HEADS[1:2], [5, 2]), found[1:2, [5, 2]])


def test_drafts_that_fall_leave_nothing(whisper, backend):
    """Wrong drafts, 15 at a time, to the last position of the cache."""
    _, model, states = whisper
    plain, sequences = decoded(model, states, backend, draft=False)
    wrong = [[(token + 7) % 300 if i % 4 == 3 else token for i, token in enumerate(row)] for row in sequences]
    e, again = decoded(
        model, states, backend, draft=False, draft_tokens=[wrong[0][3:], wrong[1][1:] + [5] * 20]
    )
    assert again == sequences
    for row, tokens in enumerate(sequences):
        positions = list(range(len(tokens) - 1))
        scores = [each.cross_scores(row, HEADS, positions) for each in (plain, e)]
        assert torch.equal(*scores) or (backend == "triton" and torch.allclose(*scores, atol=1e-5))


def test_rows_are_apart(whisper, backend):
    """A finished row's queries stay, whatever the other row goes on to do."""
    _, model, states = whisper
    e, sequences = decoded(model, states, backend, draft=False, max_length=[7, CAPACITY])
    short, _ = decoded(model, states, backend, draft=False, max_length=[7, 7])
    positions = list(range(len(sequences[0]) - 1))
    assert torch.equal(*(each.cross_scores(0, HEADS, positions) for each in (e, short)))


def test_all_rows_in_one_pass(whisper):
    """As Triton's engine steps: what a finished row has kept stays, and what has no place is no one's."""

    class Together(ReferenceEngine):
        def _step(self, k, draft, draft_tokens=None):
            self._together(self._rule(k, draft, draft_tokens))

    _, model, states = whisper
    settings = {"eos": -1, "max_length": [7, CAPACITY], "cross_queries": True, "draft": False}
    prompts = [[3, 4, 5], [3]]
    kept = []
    for kind in (ReferenceEngine, Together):
        e = kind(decoder_weights(model), batch=2, capacity=CAPACITY, cross_capacity=40)
        decode(e, states, prompts, draft_tokens=[[], [5] * 40], **settings)
        kept.append([e.cross_scores(row, HEADS, range(count)) for row, count in ((0, 6), (1, CAPACITY - 1))])
    for one, together in zip(*kept, strict=True):
        torch.testing.assert_close(one, together, atol=1e-4, rtol=1e-4)


def test_int8_caches(whisper, backend):
    _, model, states = whisper
    model.config.kvspn_encoder_stride = 2
    exact, tokens = decoded(model, states, backend, draft=False)
    guesses = [row[start:] for row, start in zip(tokens, (3, 1), strict=True)]
    e, _ = decoded(model, states, backend, kv="int8", draft=False, draft_tokens=guesses)
    model.config.kvspn_encoder_stride = 1
    positions = [0, 1, 2]  # of the prompt, so that both engines have the same tokens there
    wanted = exact.cross_scores(0, HEADS, positions)
    assert 0 < (e.cross_scores(0, HEADS, positions) - wanted).norm() < 0.05 * wanted.norm()


def test_rows_are_reordered_with_their_queries():
    cache = StepCache(2, 3, 1, 4, 5, 1)
    assert cache.keep_queries()
    assert not cache.keep_queries()
    cache.lengths += 2
    for buffer in (cache.kv, cache.cross_queries):
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    before = cache.cross_queries.clone()
    cache.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.cross_queries, before[:, [2, 0, 0]])


@pytest.mark.skipif("native" not in READY, reason="the extension is not built")
@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.zeros(2, 1, 7, 32), r"cross_queries must have 8 to 2\^24 positions, got 7"),
        (torch.zeros(2, 1, 8, 31), r"cross_queries must have shape \[2, 1, any, 32\]"),
        (torch.zeros(3, 1, 8, 32), r"cross_queries must have shape \[2, 1, any, 32\]"),
        (torch.zeros(2, 1, 8, 32).half(), "cross_queries must be fp32, got fp16"),
        (torch.zeros(2, 1, 8, 64)[..., :32], "cross_queries must be contiguous"),
    ],
)
def test_a_batch_with_other_queries_is_refused(queries, message):
    e = engine("native", random_decoder(heads=2, head_dim=16), batch=1, capacity=8, cross_capacity=4)
    e.cache.cross_queries = queries
    with pytest.raises(ValueError, match=message):
        e._bind()


def test_bad_input(backend):
    decoder = random_decoder(heads=2, head_dim=16)
    e = engine(backend, decoder, batch=1, capacity=8, cross_capacity=4)
    states = [torch.zeros(3, 32)]
    decode(e, states, [[1, 2]], eos=-1, max_length=6)
    with pytest.raises(ValueError, match=r"cross_queries must be True in start\(\)"):
        e.cross_scores(0, [(0, 0)], [0])
    decode(e, None, [[1, 2]], eos=-1, max_length=6, cross_queries=True)
    assert e.cross_scores(0, [(0, 0)], [0, 4]).shape == (1, 2, 3)
    for arguments, message in (
        ((1, [(0, 0)], [0]), "row must be in 0..0, got 1"),
        ((0, [(len(decoder.layers), 0)], [0]), "every layer of heads must be"),
        ((0, [(0, 2)], [0]), "every head of heads must be in 0..1, got 2"),
        ((0, [(0, 0)], [5]), "every one of positions must be in 0..4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            e.cross_scores(*arguments)
    decode(e, None, [[1, 2]], eos=-1, max_length=6)
    with pytest.raises(ValueError, match="cross_queries must be True"):
        e.cross_scores(0, [(0, 0)], [0])
    with pytest.raises(TypeError, match="cross_queries must be a bool"):
        decode(e, None, [[1, 2]], eos=-1, max_length=6, cross_queries=1)
