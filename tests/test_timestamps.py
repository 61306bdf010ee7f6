"""The grammar of Whisper's timestamps as a rule, on every backend: held to transformers' logits processor."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from kvspn.decoding import decode
from kvspn.engines import backends, engine
from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, Timestamps, disturb, pack_rules
from kvspn.weights.random import random_decoder

READY = [name for name, missing in backends().items() if missing is None]
if torch.cuda.is_available():
    READY = [name for name in READY if name != "cuda"]  # tests/test_gpu_cuda.py has it
VOCABULARY, END, BEGIN = 200, 90, 97
GRAMMAR = Timestamps(BEGIN, END, 20)
CAPACITY = 40


def processor(begin_index, max_initial=20):
    return WhisperTimeStampLogitsProcessor(
        GenerationConfig(
            no_timestamps_token_id=BEGIN - 1, eos_token_id=END, max_initial_timestamp_index=max_initial
        ),
        begin_index,
    )


def texts(rows, longest, prompt, seed=0):
    """Rows of a prompt and a random text of 0 to ``longest`` tokens that keep to the grammar."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(rows):
        tokens = [*range(1, 1 + prompt)]
        for _ in range(row % (longest + 1)):
            logits = torch.randn(1, VOCABULARY, generator=generator) * (1 + 2 * (row % 2))
            tokens.append(int(processor(prompt)(torch.tensor([tokens]), logits).argmax()))
        found.append(tokens)
    return found


def op_case(rows=48, prompt=3, queries=3, scale=1.0):
    """x, weight, drafts, and the rows' tokens so far: text and drafts keep to the grammar, but for some."""
    whole = texts(rows, 7 + queries - 1, prompt)
    weight, x = torch.randn(VOCABULARY, 16), scale * torch.randn(rows, queries, 16)
    lengths, tokens = [], torch.full((rows, 16), END, dtype=torch.int32)
    drafts = torch.randint(0, VOCABULARY, (rows, queries - 1), dtype=torch.int32)
    for row, text in enumerate(whole):
        kept = max(len(text) - queries + 1, prompt)
        tokens[row, :kept] = torch.tensor(text[:kept])
        drafts[row, : len(text) - kept] = torch.tensor(text[kept:])
        lengths.append(kept - 1)
    return x, weight, drafts, torch.tensor(lengths, dtype=torch.int32), tokens


def processed(logits, drafts, lengths, tokens, prompt=3):
    """What transformers makes of each query's logits; no timestamps are its to suppress."""
    found = logits.clone()
    for b, length in enumerate(lengths.tolist()):
        for j in range(logits.shape[1]):
            before = torch.cat([tokens[b, : length + 1], drafts[b, :j]]).long()
            found[b, j] = processor(prompt)(before[None], logits[b, j][None])[0]
    return found


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.8, 0), (0.8, 30)])
def test_the_grammar_is_that_of_transformers(ops, temperature, top_k, set_threads):
    """Choice, rank, scores and n best, where text is likelier and where all timestamps together are."""
    x, weight, drafts, lengths, tokens = op_case(scale=0.4)
    rules = pack_rules([Rule(temperature, row, GRAMMAR, top_k) for row in range(len(x))], [3] * len(x))
    mask = torch.zeros(VOCABULARY)
    mask[BEGIN - 1] = -torch.inf
    mask[BEGIN:] = 1.0 - 3.0 * (torch.arange(VOCABULARY - BEGIN) % 2)
    logits = x @ weight.T + mask
    wanted = processed(logits, drafts, lengths, tokens)
    text, times = wanted[..., :BEGIN], wanted[..., BEGIN:]
    assert 10 < int((text.amax(-1) == -torch.inf).sum()) < 140  # where all are suppressed, and where not
    assert int((times.amax(-1) == -torch.inf).sum()) > 10
    scores = torch.empty(*x.shape[:2], 3)
    choosing = {"rules": rules, "lengths": lengths, "tokens": tokens}
    set_threads(2)
    best = torch.empty(*x.shape[:2], 3, dtype=torch.int32), torch.empty(*x.shape[:2], 3)
    listed = {"best_tokens": best[0], "best_logits": best[1]}
    argmax, rank = ops.lm_head_verify(x, weight, drafts, mask, scores=scores, **listed, **choosing)
    assert all(map(torch.equal, ops.lm_head_verify(x, weight, drafts, mask, **choosing), (argmax, rank)))
    counted = wanted.clone()
    for b in range(len(x)):
        for j in range(x.shape[1]):
            index = int(lengths[b]) + j + 1
            counted[b, j] = disturb(wanted[b, j], rules[b], index, torch.arange(VOCABULARY))
    assert torch.equal(argmax, counted.argmax(-1).int())
    own = counted[:, :-1].gather(-1, drafts.long()[..., None])
    allowed = own[..., 0] > -torch.inf
    expected = torch.where(allowed, (counted[:, :-1] > own).sum(-1), VOCABULARY).int()
    assert torch.equal(rank, expected) and 10 < int(allowed.sum()) < allowed.numel() - 10
    torch.testing.assert_close(best[1], wanted.topk(3).values)
    assert torch.equal(best[0], torch.where(best[1] > -torch.inf, wanted.topk(3).indices, -1).int())
    torch.testing.assert_close(scores[..., 0], wanted.logsumexp(-1))
    torch.testing.assert_close(scores[..., 1], wanted.gather(-1, argmax[..., None].long())[..., 0])
    torch.testing.assert_close(scores[:, :-1, 2], wanted[:, :-1].gather(-1, drafts.long()[..., None])[..., 0])
    set_threads(1)
    one = torch.empty(1, 1, 3)
    for b in (5, 6, 7):
        alone = {"rules": rules[b : b + 1], "lengths": lengths[b : b + 1], "tokens": tokens[b : b + 1]}
        ops.lm_head_verify(x[b : b + 1, :1], weight, drafts[b : b + 1, :0], mask, scores=one, **alone)
        assert torch.equal(one[0, 0, :2], scores[b, 0, :2])


def test_ids_of_a_draft_vocabulary_in_any_order(ops):
    """As if all other tokens were suppressed."""
    x, weight, drafts, lengths, tokens = op_case(queries=1, scale=0.5)
    rules = pack_rules([Rule(0.0, 0, GRAMMAR)] * len(x), [3] * len(x))
    ids = torch.randperm(VOCABULARY)[:150].int()
    others = torch.full((VOCABULARY,), -torch.inf).index_fill(0, ids.long(), 0)
    choosing = {"rules": rules, "lengths": lengths, "tokens": tokens}
    whole, _ = ops.lm_head_verify(x, weight, drafts, others, **choosing)
    part, _ = ops.lm_head_verify(x, weight[ids.long()], drafts, ids=ids, **choosing)
    assert torch.equal(part, whole)
    assert len({bool(token >= BEGIN) for token in part.flatten().tolist()}) == 2


def test_the_text_begins_with_the_prefix(ops):
    """Its timestamp and its words are what the first choice goes by; without a prefix, nothing is."""
    prompt = [1, 2, BEGIN, 5]
    tokens = torch.tensor([prompt, prompt, [1, 2, 5, BEGIN]], dtype=torch.int32)
    lengths = torch.tensor([3, 3, 3], dtype=torch.int32)
    rules = [Rule(timestamps=GRAMMAR._replace(prefix=prefix)) for prefix in (2, 0, 1)]
    weight = torch.eye(VOCABULARY)
    logits = torch.zeros(VOCABULARY)
    logits[[7, BEGIN + 3, BEGIN + 30]] = torch.tensor([30.0, 20.0, 10.0])
    x = logits.repeat(3, 1, 1)
    none = torch.zeros(3, 0, dtype=torch.int32)
    choosing = {"rules": pack_rules(rules, [4] * 3), "lengths": lengths, "tokens": tokens}
    argmax, _ = ops.lm_head_verify(x, weight, none, **choosing)
    assert argmax.flatten().tolist() == [7, BEGIN + 3, 7]
    logits[7] = logits[BEGIN + 3] = 0
    argmax, _ = ops.lm_head_verify(logits.repeat(3, 1, 1), weight, none, **choosing)
    assert argmax.flatten().tolist() == [BEGIN + 30, BEGIN, 0]  # 30 is past the largest first one.


@pytest.mark.parametrize("at", [3, BEGIN + 5])
def test_nan_gives_no_token(ops, at):
    x, weight, drafts, lengths, tokens = op_case(rows=4)
    rules = pack_rules([Rule(timestamps=GRAMMAR)] * 4, [3] * 4)
    mask = torch.zeros(VOCABULARY)
    mask[at] = torch.nan
    choosing = {"rules": rules, "lengths": lengths, "tokens": tokens}
    argmax, rank = ops.lm_head_verify(x, weight, drafts, mask, **choosing)
    assert set(argmax.flatten().tolist()) == {-1} and set(rank.flatten().tolist()) == {K_INF}


@pytest.fixture(params=READY)
def backend(request):
    return request.param


def run(backend, decoder, batch=3, **options):
    width = decoder.embed_tokens.shape[1]
    states = [torch.linspace(-1, 1 + row, 3 * width).view(3, width) for row in range(batch)]
    prompts = [[1, 2, 3][: 1 + row % 3] for row in range(batch)]
    kv = options.pop("kv", None)
    e = engine(backend, decoder, batch=batch, capacity=CAPACITY, cross_capacity=4, kv=kv)
    mask = torch.zeros(VOCABULARY)
    mask[BEGIN - 1] = -torch.inf
    settings = {"eos": END, "max_length": CAPACITY, "timestamps": GRAMMAR, "mask": mask} | options
    return prompts, decode(e, states, prompts, **settings)


def timed_decoder(**options):
    return random_decoder(
        heads=1, head_dim=16, gain=1.5, vocabulary=VOCABULARY, positions=CAPACITY, **options
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 4}, {"kv": "int8", "temperature": 1.0, "seed": 4, "top_k": 5}],
)
def test_drafts_change_nothing(backend, options):
    """k = 1 gives what plain decoding gives, tokens and log-probabilities, wherever drafts come from; and
    every token is one that transformers' processor lets stand."""
    decoder = timed_decoder()
    prompts, plain = run(backend, decoder, draft=False, log_probs=True, **options)
    _, drafted = run(backend, decoder, log_probs=True, **options)
    assert drafted.sequences == plain.sequences and drafted.log_probs == plain.log_probs
    guesses = [tokens[len(ids) :] for tokens, ids in zip(plain.sequences, prompts, strict=True)]
    guesses[1][2] = (guesses[1][2] + 1) % VOCABULARY
    _, given = run(backend, decoder, draft=False, draft_tokens=guesses, log_probs=True, **options)
    assert given.sequences == plain.sequences and given.log_probs == plain.log_probs
    assert given.total.steps < plain.total.steps
    kinds = set()
    for ids, tokens in zip(prompts, plain.sequences, strict=True):
        for at in range(len(ids), len(tokens)):
            flat = processor(len(ids))
            flat._detect_timestamp_from_logprob = False
            allowed = flat(torch.tensor([tokens[:at]]), torch.zeros(1, VOCABULARY))[0]
            assert allowed[tokens[at]] == 0
            kinds.add(tokens[at] >= BEGIN)
    assert kinds == {False, True}


@pytest.mark.parametrize("prefix", [0, 1])
def test_every_backend_says_the_same(backend, prefix):
    """Tokens, and how many of the draft network's stand; with a prompt's last token as text, too."""
    decoder, grammar = timed_decoder(), GRAMMAR._replace(prefix=prefix)
    (prompts, said), (_, wanted) = (
        run(name, decoder, batch=5, timestamps=grammar) for name in (backend, "reference")
    )
    same = [mine == other for mine, other in zip(said.sequences, wanted.sequences, strict=True)]
    assert sum(same) >= 4  # Rounding may decide one.
    for alike, mine, other in zip(same, said.rows, wanted.rows, strict=True):
        assert not alike or (mine.accepted, mine.drafted) == (other.accepted, other.drafted)
    begins = [tokens[len(ids)] >= BEGIN for ids, tokens in zip(prompts, said.sequences, strict=True)]
    assert all(begins) != bool(prefix)


def test_rows_with_and_without_timestamps(backend):
    """Each is its own: what a row says does not depend on the others' rules."""
    decoder = timed_decoder()
    width = decoder.embed_tokens.shape[1]
    states = torch.linspace(-1, 1, 3 * width).view(3, width)

    def rows(prompts, rules):
        e = engine(backend, decoder, batch=len(prompts), capacity=CAPACITY, cross_capacity=4)
        e.start([states] * len(prompts), prompts, eos=END, max_length=CAPACITY, rules=rules)
        e.run(1, True, steps=CAPACITY)
        return [tokens[: length + 1] for tokens, length in zip(e.tokens.tolist(), e.lengths, strict=True)]

    prompts = [[1, 2], [3], [4, 5, 6], [4, 5, 6]]
    rules = [Rule(0.0, 0, GRAMMAR), Rule(), Rule(0.7, 5, GRAMMAR), Rule(0.7, 5)]
    together = rows(prompts, rules)
    assert together == [rows([prompt], [rule])[0] for prompt, rule in zip(prompts, rules, strict=True)]
    assert together[2] != together[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"begin": 0}, r"timestamps.begin must be"),
        ({"begin": VOCABULARY}, rf"timestamps.begin must be in 1..{VOCABULARY - 1}, got {VOCABULARY}"),
        ({"text_end": BEGIN + 1}, rf"timestamps.text_end must be in 0..{BEGIN}, got {BEGIN + 1}"),
        ({"max_initial": -1}, r"timestamps.max_initial must be"),
        ({"prefix": -1}, r"timestamps.prefix must be"),
    ],
)
def test_errors(backend, change, message):
    with pytest.raises(ValueError, match=message):
        run(backend, timed_decoder(), timestamps=GRAMMAR._replace(**change))


def test_a_grammar_is_timestamps(backend):
    with pytest.raises(TypeError, match="timestamps must be Timestamps or None, got tuple"):
        run(backend, timed_decoder(), timestamps=(BEGIN, END))
