"""Sampled tokens, first masks and log-probabilities, on every backend: with drafts to the bit as without."""

import pytest
import torch

from kvspn.decoding import decode
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, disturb, pack_rules, philox, row_seed, uniform
from kvspn.weights.random import random_decoder
from support.scripted import VOCABULARY, chain, scripted_decoder

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu.py has it
CAPACITY = 12


@pytest.fixture(params=READY)
def backend(request):
    return request.param


def weights(**options):
    return random_decoder(heads=1, head_dim=16, gain=1.5, **options)


def run(backend, prompts, decoder=None, kv=None, **options):
    decoder = decoder or weights()
    width = decoder.embed_tokens.shape[1]
    states = torch.linspace(-1, 1, 3 * width).view(3, width)
    e = engine(backend, decoder, batch=len(prompts), capacity=CAPACITY, cross_capacity=4, kv=kv)
    settings = {"eos": -1, "max_length": CAPACITY} | options
    return decode(e, [states] * len(prompts), prompts, **settings)


def test_philox_is_philox():
    """The known answers of the reference implementation, Random123."""
    assert [int(word) for word in philox(0, 0, torch.tensor([0]), 0)] == [
        *(0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ]
    ones, digits = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert [int(word) for word in philox(ones, ones, torch.tensor([ones]), ones, ones, ones)] == [
        *(0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    ]
    assert [int(word) for word in philox(*digits[4:], torch.tensor([digits[0]]), *digits[1:4])] == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


@pytest.mark.parametrize(
    ("temperature", "kv", "top_k"), [(0.3, None, 0), (1.0, "int8", 0), (2.5, None, 5), (2.5, "int8", 40)]
)
def test_drafts_change_nothing(backend, temperature, kv, top_k):
    """Speculative sampling is plain sampling, bit for bit, for every seed and wherever drafts come from."""
    prompts = [[1, 2], [3], [4, 5, 6]]
    for seed in range(4 if backend == "native" else 1):
        sampled = {"temperature": temperature, "seed": seed, "kv": kv, "top_k": top_k}
        plain = run(backend, prompts, draft=False, log_probs=True, **sampled)
        drafted = run(backend, prompts, log_probs=True, **sampled)
        assert drafted.sequences == plain.sequences
        assert drafted.log_probs == plain.log_probs
        guesses = [tokens[len(ids) :] for tokens, ids in zip(plain.sequences, prompts, strict=True)]
        guesses[1][2] = (guesses[1][2] + 1) % 29
        given = run(backend, prompts, draft=False, draft_tokens=guesses, log_probs=True, **sampled)
        assert given.sequences == plain.sequences
        assert given.log_probs == plain.log_probs
        assert given.total.steps < plain.total.steps


def test_a_row_is_its_own(backend):
    """Its tokens do not depend on the batch, but on its seed and prompt."""
    decoder = weights()
    width = decoder.embed_tokens.shape[1]
    states = torch.linspace(-1, 1, 3 * width).view(3, width)

    def rows(prompts, rules):
        e = engine(backend, decoder, batch=len(prompts), capacity=CAPACITY, cross_capacity=4)
        e.start([states] * len(prompts), prompts, eos=-1, max_length=CAPACITY, rules=rules)
        e.run(1, True, steps=CAPACITY)
        return e.tokens.tolist()

    prompts = [[1, 2], [3], [4, 5, 6]]
    rules = [Rule(1.0, 2**64 - 1), Rule(), Rule(0.7, 5, None, 3)]
    together = rows(prompts, rules)
    assert together == [
        row for prompt, rule in zip(prompts, rules, strict=True) for row in rows([prompt], [rule])
    ]
    assert together[1] == rows([[3]], None)[0]
    assert rows([[3]], [Rule(1.0, 1)]) != rows([[3]], [Rule(1.0, 2)])
    assert rows([[3]], [Rule(1.0, 1)]) != rows([[3]], [Rule(1.0, 1 + (1 << 32))])


def test_every_backend_draws_alike(backend):
    """The noise is the same, so that the tokens are, but for what rounding decides."""
    same = 0
    for seed in range(4):
        options = {"temperature": 1.0, "seed": seed, "top_k": 7 * (seed % 2), "max_length": 6}
        drawn, wanted = (run(name, [[1], [2]], **options).sequences for name in (backend, "reference"))
        same += drawn == wanted
    assert same >= 3


def chi_square(counts, probabilities):
    """How likely counts as far off as these are, or farther (Pearson). Rare cells count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (counts, expected)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    freedom = torch.tensor((len(cells[0]) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 0), (1.0, 0), (3.0, 0), (3.0, 5)])
def test_the_distribution_is_that_of_softmax(temperature, top_k):
    """Of many seeds' draws, which are the same each time; other backends draw as this one does."""
    decoder, batch = weights(vocabulary=12), 240
    known = torch.empty(12, dtype=torch.float64)
    for token in range(12):
        forced = run("reference", [[1]], decoder, k=K_INF, max_length=2, **forcing(token))
        known[token] = forced.log_probs[0][0]
    assert float(known.exp().sum()) == pytest.approx(1, abs=1e-5)
    counts = torch.zeros(12, dtype=torch.float64)
    rule = {"temperature": temperature, "top_k": top_k}
    for seed in range(10):
        drawn = run("native", [[1]] * batch, decoder, max_length=2, seed=seed, **rule)
        counts += torch.bincount(torch.tensor(drawn.sequences)[:, 1], minlength=12)
    if top_k:
        known, likeliest = known.topk(top_k)
        assert counts[likeliest].sum() == counts.sum()
        counts = counts[likeliest]
    assert chi_square(counts, (known / temperature).softmax(0)) > 1e-3
    assert chi_square(counts, (known / (temperature * 1.2)).softmax(0)) < 1e-3  # It would notice.


def forcing(token):
    return {"draft": False, "draft_tokens": [[token]], "log_probs": True}


def test_the_noise_is_fair():
    """Moments of Gumbel's distribution, and no relation between neighbours in token, index or seed."""
    tokens = torch.arange(50_000)
    zeros = torch.zeros(50_000)
    noise = [
        disturb(zeros, pack_rules([Rule(1.0, seed)], [1])[0], index, tokens).double()
        for seed, index in ((1, 7), (1, 8), (2, 7), (1 + (1 << 32), 7))
    ]
    for each in noise:
        assert float(each.mean()) == pytest.approx(0.5772, abs=0.03)
        assert float(each.var()) == pytest.approx(1.6449, abs=0.06)
        assert abs(float(torch.corrcoef(torch.stack([each[1:], each[:-1]]))[0, 1])) < 0.02
    assert float((torch.corrcoef(torch.stack(noise)) - torch.eye(4)).abs().max()) < 0.02
    assert 0 < float(uniform(3, 5, 9, tokens).min()) < float(uniform(3, 5, 9, tokens).max()) < 1


def test_rows_of_a_batch_have_seeds_of_their_own():
    assert len({row_seed(seed, row) for seed in range(100) for row in range(100)}) == 10_000
    assert all(0 <= row_seed(seed, 3) < 2**64 for seed in (0, 1, 2**64 - 1))


# Next to each token alone: a chain that a first mask diverts.
LOOP = chain(*range(1, 30))  # 1, 2, ..., 29, then 0


def only(*tokens):
    mask = torch.full((VOCABULARY,), -torch.inf)
    mask[list(tokens)] = 0
    return mask


@pytest.mark.parametrize("source", ["none", "network", "given"])
def test_the_first_token_is_drafted_too(backend, source):
    """Under its own mask, which base model and draft network share; the second one is under the other."""
    options = {"draft": source == "network", "begin_mask": only(20), "max_length": 7}
    if source == "given":
        options["draft_tokens"] = [[20, 21, 22], [19]]
    result = run(backend, [[1], [5, 6]], scripted_decoder(LOOP, LOOP), **options)
    assert result.sequences == [[1, 20, 21, 22, 23, 24, 25], [5, 6, 20, 21, 22, 23, 24]]
    drafted, accepted = result.rows[0].drafted, result.rows[0].accepted
    assert (drafted, accepted) == {"none": (0, 0), "network": (3, 3), "given": (3, 3)}[source]


def test_a_first_mask_is_one_rows_own(backend):
    """Rows come to their first tokens at different indices."""
    result = run(
        backend, [[1], [1, 2, 3]], scripted_decoder(LOOP, LOOP), draft=False, begin_mask=only(9), max_length=6
    )
    assert result.sequences == [[1, 9, 10, 11, 12, 13], [1, 2, 3, 9, 10, 11]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_are_those_of_the_reference(backend, temperature):
    """Of masked logits at temperature 1, also where k lets what is not the likeliest stand."""
    mask = torch.zeros(29)
    mask[[0, 4]] = -torch.inf
    mask[7] = 2
    decoder = weights()
    prompts = [[1, 2], [3]]
    sampled = run(
        backend, prompts, decoder, temperature=temperature, k=5, mask=mask, log_probs=True, max_length=12
    )
    teacher = run(
        *("reference", prompts, decoder),
        k=K_INF,
        draft=False,
        draft_tokens=[tokens[len(ids) :] for tokens, ids in zip(sampled.sequences, prompts, strict=True)],
        mask=mask,
        log_probs=True,
        max_length=12,
    )
    assert teacher.sequences == sampled.sequences
    for own, other in zip(sampled.log_probs, teacher.log_probs, strict=True):
        assert own == pytest.approx(other, abs=2e-4)


def test_log_probs_of_a_forbidden_token(backend):
    """A draft that every k accepts, and that the mask forbids, has no probability."""
    mask = torch.zeros(29)
    mask[3] = -torch.inf
    result = run(
        *(backend, [[1]]),
        **(forcing(3) | {"k": K_INF, "mask": mask, "max_length": 3}),
    )
    assert result.sequences[0][1] == 3
    assert result.log_probs[0][0] == -torch.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"^temperature must be 0 or a positive number, got -0\.5"),
        ({"temperature": float("nan")}, r"^temperature must be 0 or a positive number, got nan"),
        ({"temperature": float("inf")}, r"^temperature must be 0 or a positive number, got inf"),
        ({"temperature": 1.0, "top_k": -1}, r"^top_k must be in 0\.\.2147483647, got -1"),
        ({"top_k": 3}, r"^top_k must be 0 without a temperature, got 3"),
        ({"seed": -1}, r"^seed must be in 0\.\.18446744073709551615, got -1"),
        ({"seed": 2**64}, r"^seed must be in 0\.\.18446744073709551615, got 18446744073709551616"),
    ],
)
def test_bad_rules(options, message):
    with pytest.raises(ValueError, match=message):
        run("reference", [[1]], **options)


@pytest.mark.parametrize(
    ("options", "name"), [({"temperature": "hot"}, "temperature"), ({"seed": 1.5}, "seed")]
)
def test_rules_of_another_type(options, name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        run("reference", [[1]], **options)
