import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import TopKLogitsWarper

from kvspn.ops import K_INF
from kvspn.ops.rules import Rule, disturb, pack_rules


def by_sorting(logits, drafts):
    """Choices and ranks from a stable sort: larger logits first, smaller ids first among equals."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ranks = [
        [order[b, j].tolist().index(d) for j, d in enumerate(row)] for b, row in enumerate(drafts.tolist())
    ]
    return order[..., 0].int(), torch.tensor(ranks, dtype=torch.int32).reshape(drafts.shape)


@pytest.mark.parametrize(
    ("batch", "queries", "width", "vocabulary"), [(2, 3, 8, 31), (1, 1, 5, 1), (3, 2, 4, 100)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_against_a_sort(ops, dtype, batch, queries, width, vocabulary, norm):
    """Small integers make every logit exact, and many of them equal."""
    x = torch.randint(-2, 3, (batch, queries, width)).to(dtype)
    weight = torch.randint(-2, 3, (vocabulary, width)).to(dtype)
    draft = torch.randint(0, vocabulary, (batch, queries - 1), dtype=torch.int32)
    arguments, rows = {}, x.float()
    if norm:
        arguments = {"norm_weight": torch.rand(width), "norm_bias": torch.rand(width), "eps": 1e-3}
        rows = F.layer_norm(rows, (width,), *list(arguments.values()))
    argmax, rank = ops.lm_head_verify(x, weight, draft, **arguments)
    expected_argmax, expected_rank = by_sorting(rows @ weight.float().T, draft)
    if not norm:  # sums of integers are exact in any order
        assert torch.equal(argmax, expected_argmax)
        assert torch.equal(rank, expected_rank)
    assert (argmax.dtype, rank.dtype) == (torch.int32, torch.int32)
    assert torch.equal((rank < 1), (draft == argmax[:, :-1]))


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn])
def test_norm_and_weight_formats(ops, weight_dtype):
    """Well-separated logits: LayerNorm and a quantised weight give the formula's order."""
    x = torch.randn(2, 2, 16)
    values, scale = torch.randint(-127, 128, (40, 16)), torch.rand(40)
    norm_weight, norm_bias = torch.rand(16), torch.rand(16)
    draft, weight = torch.tensor([[3], [39]], dtype=torch.int32), values.to(weight_dtype)
    actual = ops.lm_head_verify(x, weight, draft, scale=scale, norm_weight=norm_weight, norm_bias=norm_bias)
    rows = F.layer_norm(x.double(), (16,), norm_weight.double(), norm_bias.double())
    expected = by_sorting(rows @ (weight.float() * scale[:, None]).double().T, draft)
    assert all(map(torch.equal, actual, expected))


def test_ties_and_mask(ops):
    x = torch.ones(1, 2, 1)
    weight = torch.tensor([[1.0], [5.0], [5.0], [3.0], [5.0]])
    for draft, rank in ((1, 0), (2, 1), (4, 2), (3, 3), (0, 4)):
        choices, ranks = ops.lm_head_verify(x, weight, torch.tensor([[draft]], dtype=torch.int32))
        assert choices.tolist() == [[1, 1]]
        assert ranks.tolist() == [[rank]]
    mask = torch.tensor([0, -torch.inf, -torch.inf, 2.5, 0])
    choices, ranks = ops.lm_head_verify(x, weight, torch.tensor([[4]], dtype=torch.int32), mask)
    assert choices.tolist() == [[3, 3]]
    assert ranks.tolist() == [[1]]


@pytest.mark.parametrize("token", [0, 9, 2999])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_faults_a_row_with_nan_has_no_token(ops, token, value):
    """Wherever it is, and whatever else the row holds; the other rows have theirs. Infinity is a number."""
    weight = torch.linspace(-1, 1, 3000)[:, None].repeat(1, 2)
    weight[token, 1] = value
    weight[17, 0] = 5
    x, draft = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[17]], dtype=torch.int32)
    x = torch.cat([x, x.flip(1)])
    draft = torch.tensor([[17], [17]], dtype=torch.int32)
    if value == torch.inf:
        x[x == 0] = 0.5
    choices, ranks = ops.lm_head_verify(x, weight, draft)
    if value == torch.inf:
        assert choices.tolist() == [[token, token]] * 2
        assert ranks.tolist() == [[1], [1]]
        return
    assert choices.tolist() == [[-1, -1], [-1, -1]]  # 0 times NaN, too
    choices, ranks = ops.lm_head_verify(x[..., :1].contiguous(), weight[:, :1].contiguous(), draft)
    assert choices.tolist() == [[17, 17]] * 2
    mask = torch.zeros(3000)
    mask[token] = torch.nan
    choices, ranks = ops.lm_head_verify(x[..., :1].contiguous(), weight[:, :1].contiguous(), draft, mask)
    assert choices.tolist() == [[-1, -1]] * 2
    assert ranks.tolist() == [[K_INF]] * 2


def test_faults_a_row_of_which_everything_is_forbidden_has_no_token(ops):
    mask = torch.full((3000,), -torch.inf)
    draft = torch.tensor([[2]], dtype=torch.int32)
    choices, ranks = ops.lm_head_verify(torch.ones(1, 2, 4), torch.ones(3000, 4), draft, mask)
    assert (choices.tolist(), ranks.tolist()) == ([[-1, -1]], [[K_INF]])
    mask[2999] = -5
    choices, _ = ops.lm_head_verify(torch.ones(1, 2, 4), torch.ones(3000, 4), draft, mask)
    assert choices.tolist() == [[2999, 2999]]


@pytest.mark.parametrize("draft", [-1, 7, 2**31 - 1, -(2**31)])
def test_a_draft_outside_the_vocabulary_ranks_last(ops, draft):
    _, ranks = ops.lm_head_verify(
        torch.randn(1, 2, 3), torch.randn(7, 3), torch.tensor([[draft]], dtype=torch.int32)
    )
    assert ranks.tolist() == [[K_INF]]


def test_row_invariance(ops, dtype, set_threads):
    x, weight = torch.randn(3, 4, 32).to(dtype), torch.randn(3000, 32).to(dtype)
    draft = torch.randint(0, 3000, (3, 3), dtype=torch.int32)
    mask, norm = torch.randn(3000), {"norm_weight": torch.rand(32), "norm_bias": torch.rand(32)}
    set_threads(1)
    argmax, rank = ops.lm_head_verify(x, weight, draft, mask, **norm)
    set_threads(2)
    assert all(map(torch.equal, ops.lm_head_verify(x, weight, draft, mask, **norm), (argmax, rank)))
    for b in range(3):
        for j in range(3):
            pair = x[b : b + 1, j : j + 2].clone()
            choices, ranks = ops.lm_head_verify(pair, weight, draft[b : b + 1, j : j + 1], mask, **norm)
            assert torch.equal(choices[0], argmax[b, j : j + 2])
            assert torch.equal(ranks[0, 0], rank[b, j])


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_rules_disturb_choice_and_rank(ops, dtype):
    """Each row by its own temperature, seed and index, as the formula has it."""
    x, weight = torch.randn(3, 3, 16).to(dtype), torch.randn(200, 16).to(dtype)
    draft = torch.randint(0, 200, (3, 2), dtype=torch.int32)
    rules, lengths = pack_rules([Rule(), Rule(0.7, 5), Rule(3.0, 2**64 - 1)], [1, 1, 1]), i32(4, 0, 9)
    mask = torch.zeros(200)
    mask[::3] = -torch.inf
    argmax, rank = ops.lm_head_verify(
        x, weight, draft, mask, rules=rules, lengths=lengths, tokens=i32([0], [0], [0])
    )
    logits = x.float() @ weight.float().T + mask
    counted = torch.stack(
        [
            torch.stack(
                [
                    disturb(logits[b, j], rules[b], int(lengths[b]) + j + 1, torch.arange(200))
                    for j in range(3)
                ]
            )
            for b in range(3)
        ]
    )
    expected_argmax, expected_rank = by_sorting(counted, draft)
    assert torch.equal(argmax, expected_argmax)
    forbidden = mask[draft.long()] == -torch.inf
    assert torch.equal(rank[~forbidden], expected_rank[~forbidden])


@pytest.mark.parametrize(("top_k", "n", "kept"), [(0, 0, 0), (5, 0, 1), (0, 2, 1)])
def test_logits_are_kept_where_they_are_asked_for_alone(top_k, n, kept, monkeypatch):
    """What Triton launches for rules: most have no top_k, and must not store the vocabulary."""
    module = sys.modules.get("kvspn.triton_kernels.lm_head_verify")
    if module is None or torch.cuda.is_available():
        pytest.skip("the triton backend does not run on this device")
    launched = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__), raising=True
    )
    rules = pack_rules([Rule(0.7, 1, None, top_k), Rule()], [1, 1])
    assert rules.shape == (2, 9 if top_k else 8)
    listed = {}
    if n:
        listed = {"best_tokens": torch.zeros(2, 1, n).int(), "best_logits": torch.zeros(2, 1, n)}
    module.launch_lm_head_verify(
        *(torch.randn(2, 1, 16), torch.randn(40, 16), torch.zeros(2, 0, dtype=torch.int32)),
        **{"rules": rules, "lengths": i32(0, 0), "tokens": i32([0], [0]), **listed},
    )
    assert "vocabulary_kernel" in launched
    assert launched.count("kept_kernel") == kept


def test_ids_are_the_tokens_of_rows(ops):
    """A part of the vocabulary: as if all others were forbidden, to masks and noise alike."""
    x, weight = 0.1 * torch.randn(9, 1, 16), torch.randn(90, 16)  # Noise decides.
    ids = torch.randperm(90)[:37].sort().values.int()
    mask, first_mask = torch.randn(2, 90)
    none = torch.zeros(9, 0, dtype=torch.int32)
    rules = pack_rules([Rule(), *(Rule(1.0, seed) for seed in range(8))], [5, 5, 9, *range(6)])
    lengths = i32(*[4] * 9)
    others = torch.full((90,), -torch.inf).index_fill(0, ids.long(), 0)
    whole, _ = ops.lm_head_verify(
        x,
        weight,
        none,
        mask + others,
        first_mask=first_mask + others,
        rules=rules,
        lengths=lengths,
        tokens=i32(*[[0]] * len(x)),
    )
    part, _ = ops.lm_head_verify(
        x,
        weight[ids.long()],
        none,
        mask,
        ids=ids,
        first_mask=first_mask,
        rules=rules,
        lengths=lengths,
        tokens=i32(*[[0]] * len(x)),
    )
    assert torch.equal(part, whole)
    plain, _ = ops.lm_head_verify(x, weight[ids.long()], none, ids=ids)
    assert torch.equal(plain, ops.lm_head_verify(x, weight, none, others)[0])
    assert set(plain.flatten().tolist()) <= set(ids.tolist())


def test_the_first_mask_is_for_the_first_token(ops):
    """Of each row, wherever that lies; in place of the mask."""
    x, weight = torch.randn(3, 3, 8), torch.randn(40, 8)
    mask, first_mask = torch.randn(2, 40) * 3
    rules, lengths = pack_rules([Rule()] * 3, [5, 7, 1]), i32(4, 4, 4)  # Query 0, query 2, none.
    draft = torch.randint(0, 40, (3, 2), dtype=torch.int32)
    for common in (mask, None):
        found = ops.lm_head_verify(
            x,
            weight,
            draft,
            common,
            first_mask=first_mask,
            rules=rules,
            lengths=lengths,
            tokens=i32(*[[0]] * len(x)),
        )
        added = torch.zeros(3, 3, 40) if common is None else common.repeat(3, 3, 1)
        added[0, 0] = added[1, 2] = first_mask
        assert all(map(torch.equal, found, by_sorting(x @ weight.T + added, draft)))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_scores(ops, temperature, set_threads):
    """The log-sum-exp of masked logits, and of these those of choice and draft; to the bit a row's own."""
    x, weight = torch.randn(2, 3, 16), torch.randn(3000, 16)
    draft = i32([5, 2999], [-1, 7])
    mask = torch.zeros(3000)
    mask[7] = -torch.inf
    rules, lengths = pack_rules([Rule(temperature, 1), Rule(temperature, 2)], [1, 1]), i32(3, 5)
    choosing = {"rules": rules, "lengths": lengths, "tokens": i32([0], [0])}
    scores = torch.full((2, 3, 3), torch.nan)
    set_threads(2)
    argmax, rank = ops.lm_head_verify(x, weight, draft, mask, scores=scores, **choosing)
    assert all(map(torch.equal, ops.lm_head_verify(x, weight, draft, mask, **choosing), (argmax, rank)))
    logits = x @ weight.T + mask
    torch.testing.assert_close(scores[..., 0], logits.logsumexp(-1))
    torch.testing.assert_close(scores[..., 1], logits.gather(-1, argmax[..., None].long())[..., 0])
    expected = torch.full((2, 3), -torch.inf)
    expected[0, :2] = torch.stack([logits[0, 0, 5], logits[0, 1, 2999]])
    torch.testing.assert_close(scores[..., 2], expected)
    set_threads(1)
    one = torch.empty(1, 2, 3)
    ops.lm_head_verify(
        x[1:, 1:],
        weight,
        draft[1:, 1:],
        mask,
        scores=one,
        rules=rules[1:],
        lengths=lengths[1:] + 1,
        tokens=i32([0]),
    )
    assert torch.equal(one[0], scores[1, 1:])


def test_scores_of_a_row_without_a_token(ops):
    scores = torch.zeros(1, 1, 3)
    argmax, _ = ops.lm_head_verify(
        torch.ones(1, 1, 4),
        torch.ones(9, 4),
        torch.zeros(1, 0, dtype=torch.int32),
        torch.full((9,), -torch.inf),
        scores=scores,
    )
    assert argmax.tolist() == [[-1]]
    assert scores[0, 0, 1:].tolist() == [-torch.inf, -torch.inf]


def choosing(rules, lengths=None):
    """Of rows whose first token comes next, or at these lengths."""
    lengths = i32(*[0] * len(rules)) if lengths is None else lengths
    return {
        "rules": pack_rules(rules, [1] * len(rules)),
        "lengths": lengths,
        "tokens": i32(*[[0]] * len(rules)),
    }


def best_of(logits, n):
    """The n best tokens and their logits, from a stable sort."""
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :n]
    values = logits.gather(-1, order)
    tokens, values = torch.where(values > -torch.inf, order, -1), values
    return F.pad(tokens, (0, n - tokens.shape[-1]), value=-1).int(), F.pad(
        values, (0, n - values.shape[-1]), value=-torch.inf
    )


def listed(ops, n, x, *arguments, **more):
    found = x.new_zeros(*x.shape[:2], n).int(), torch.zeros(*x.shape[:2], n)
    ops.lm_head_verify(x, *arguments, best_tokens=found[0], best_logits=found[1], **more)
    return found


@pytest.mark.parametrize(("n", "ruled"), [(1, False), (16, True)])
def test_n_best(ops, n, ruled, set_threads):
    """Many logits are equal, some suppressed; noise and top_k do not count."""
    x, weight = torch.randint(-2, 3, (2, 2, 4)).float(), torch.randint(-2, 3, (200, 4)).float()
    draft, mask = i32([3], [199]), torch.zeros(200)
    mask[::3] = -torch.inf
    rules = choosing([Rule(2.0, 1, None, 3), Rule(0.5, 2)]) if ruled else {}
    tokens, logits = listed(ops, n, x, weight, draft, mask, **rules)
    expected = best_of(x @ weight.T + mask, n)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
    set_threads(1)
    one = listed(ops, n, x[1:], weight, draft[1:], mask, **(choosing([Rule(0.5, 2)]) if ruled else {}))
    assert torch.equal(one[0], tokens[1:])


def test_n_best_of_a_draft_vocabulary(ops):
    x, ids = torch.randn(2, 1, 8), i32(3, 9, 20, 71)
    weight, none = torch.randn(4, 8), torch.zeros(2, 0, dtype=torch.int32)
    tokens, logits = listed(ops, 5, x, weight, none, ids=ids)
    assert torch.equal(tokens[..., :4], ids[best_of(x @ weight.T, 4)[0].long()])
    assert (tokens[..., 4].tolist(), logits[..., 4].tolist()) == ([[-1], [-1]], [[-torch.inf], [-torch.inf]])


def test_n_best_of_a_row_without_a_token(ops):
    mask, none = torch.full((9,), -torch.inf), torch.zeros(1, 0, dtype=torch.int32)
    tokens, logits = listed(ops, 2, torch.ones(1, 1, 4), torch.ones(9, 4), none, mask)
    assert (tokens.tolist(), logits.tolist()) == ([[[-1, -1]]], [[[-torch.inf] * 2]])
    mask[:] = 0
    mask[4] = torch.nan
    tokens, logits = listed(ops, 2, torch.ones(1, 1, 4), torch.ones(9, 4), none, mask)
    assert (tokens.tolist(), logits.tolist()) == ([[[-1, -1]]], [[[-torch.inf] * 2]])


@pytest.mark.parametrize("top_k", [1, 7, 10_000])
def test_top_k_is_that_of_transformers(ops, top_k, set_threads):
    """A draw among what its warper leaves, what equals the last of them too; the others have no rank."""
    x, weight = torch.randint(-2, 3, (3, 2, 3)).float(), torch.randint(-2, 3, (200, 3)).float()
    mask = torch.zeros(200)
    mask[::3] = -torch.inf
    draft = torch.randint(0, 200, (3, 1), dtype=torch.int32)
    rules = choosing([Rule(1.5, seed, None, top_k) for seed in range(3)], i32(*range(3)))
    scores = torch.zeros(3, 2, 3)
    argmax, rank = ops.lm_head_verify(x, weight, draft, mask, scores=scores, **rules)
    logits = x @ weight.T + mask
    warped = TopKLogitsWarper(top_k)(None, logits.flatten(0, 1)).view_as(logits)
    plain = rules["rules"].clone()
    plain[:, 8] = 0
    counted = torch.stack(
        [
            torch.stack([disturb(warped[b, j], plain[b], b + j + 1, torch.arange(200)) for j in range(2)])
            for b in range(3)
        ]
    )
    expected_argmax, expected_rank = by_sorting(counted, draft)
    assert torch.equal(argmax, expected_argmax)
    cut = counted[:, :1].gather(-1, draft[..., None].long())[..., 0] == -torch.inf
    assert torch.equal(rank, torch.where(cut, 200, expected_rank))
    torch.testing.assert_close(scores[..., 0], logits.logsumexp(-1))  # of all that the mask allows
    assert torch.equal(scores[..., 1], logits.gather(-1, argmax[..., None].long())[..., 0])
    assert torch.equal(scores[:, :1, 2], logits[:, :1].gather(-1, draft[..., None].long())[..., 0])
    set_threads(1)
    alone = ops.lm_head_verify(
        x[2:], weight, draft[2:], mask, **choosing([Rule(1.5, 2, None, top_k)], i32(2))
    )
    assert all(map(torch.equal, alone, (argmax[2:], rank[2:])))


def test_top_k_is_a_rows_own(ops):
    """Beside rows that are greedy or drawn from all; and without a temperature it is nothing."""
    x, weight = torch.randn(4, 1, 8), torch.randn(300, 8)
    none = torch.zeros(4, 0, dtype=torch.int32)
    rules = [Rule(9.0, 1, None, 1), Rule(), Rule(9.0, 1), Rule(9.0, 1, None, 2)]
    packed = choosing(rules)
    packed["rules"][1, 8] = 3
    argmax, _ = ops.lm_head_verify(x, weight, none, **packed)
    logits = x[:, 0] @ weight.T
    assert argmax[:2, 0].tolist() == logits[:2].argmax(-1).tolist()
    assert int(argmax[2]) == int(disturb(logits[2], packed["rules"][2], 1, torch.arange(300)).argmax())
    assert int(argmax[3]) in logits[3].topk(2).indices.tolist()


@pytest.mark.parametrize("top_k", [1, 2999])
def test_faults_nan_beside_top_k(ops, top_k):
    weight = torch.linspace(-1, 1, 3000)[:, None].contiguous()
    mask = torch.zeros(3000)
    mask[1234] = torch.nan
    found = ops.lm_head_verify(
        torch.ones(1, 2, 1), weight, i32([17]), mask, **choosing([Rule(1.0, 0, None, top_k)])
    )
    assert [each.tolist() for each in found] == [[[-1, -1]], [[K_INF]]]
