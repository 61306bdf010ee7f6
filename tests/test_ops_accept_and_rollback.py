import pytest
import torch

from kvspn.ops import K_INF

EOS = 9


def run(ops, *, tokens, draft, argmax, rank, k=1, max_length=8, finished=False, eos=EOS):
    """One row beside a finished one; returns what became of it."""
    row = torch.full((2, 8), -7, dtype=torch.int32)  # -7: not written
    row[:, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    lengths = torch.full((2,), len(tokens) - 1, dtype=torch.int32)
    done = torch.tensor([finished, True])
    stats = torch.tensor([[5, 6, 7], [1, 2, 3]], dtype=torch.int32)
    before = [tensor[1].clone() for tensor in (row, lengths, done, stats)]
    both = [torch.tensor([values, values], dtype=torch.int32) for values in (draft, argmax, rank)]
    assert ops.accept_and_rollback(row, lengths, done, stats, *both, k, eos, max_length) is None
    assert all(map(torch.equal, (tensor[1] for tensor in (row, lengths, done, stats)), before))
    written = [token for token in row[0].tolist() if token != -7]
    return written, int(lengths[0]) + 1, bool(done[0]), (stats[0] - torch.tensor([5, 6, 7])).tolist()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # tokens afterwards, their count, finished, [steps, drafted, accepted]
        ({"draft": [], "argmax": [4], "rank": []}, ([1, 2, 4], False, [1, 0, 0])),
        ({"draft": [4], "argmax": [4, 5], "rank": [0]}, ([1, 2, 4, 5], False, [1, 1, 1])),
        ({"draft": [3], "argmax": [4, 5], "rank": [1]}, ([1, 2, 4], False, [1, 1, 0])),
        ({"draft": [3], "argmax": [4, 5], "rank": [1], "k": 2}, ([1, 2, 3, 5], False, [1, 1, 1])),
        ({"draft": [3], "argmax": [4, 5], "rank": [70], "k": K_INF}, ([1, 2, 3, 5], False, [1, 1, 1])),
        ({"draft": [3], "argmax": [4, 5], "rank": [K_INF], "k": K_INF}, ([1, 2, 4], False, [1, 1, 0])),
        # the longest prefix: what stands behind a rejection is rejected
        ({"draft": [3, 6, 7], "argmax": [4, 5, 6, 8], "rank": [0, 2, 0]}, ([1, 2, 3, 5], False, [1, 3, 1])),
        (
            {"draft": [3, 6, 7], "argmax": [4, 5, 6, 8], "rank": [0, 0, 0]},
            ([1, 2, 3, 6, 7, 8], False, [1, 3, 3]),
        ),
        # an eos ends the row: drafted, chosen, and in the midst of a draft
        ({"draft": [9], "argmax": [9, 5], "rank": [0]}, ([1, 2, 9], True, [1, 1, 1])),
        ({"draft": [3], "argmax": [3, 9], "rank": [0]}, ([1, 2, 3, 9], True, [1, 1, 1])),
        ({"draft": [3], "argmax": [9, 5], "rank": [4]}, ([1, 2, 9], True, [1, 1, 0])),
        ({"draft": [3, 9, 7], "argmax": [3, 9, 7, 8], "rank": [0, 0, 0]}, ([1, 2, 3, 9], True, [1, 3, 2])),
        ({"draft": [9], "argmax": [9, 5], "rank": [0], "eos": -1}, ([1, 2, 9, 5], False, [1, 1, 1])),
        # so does the length
        ({"draft": [3], "argmax": [3, 5], "rank": [0], "max_length": 4}, ([1, 2, 3, 5], True, [1, 1, 1])),
        ({"draft": [3], "argmax": [3, 5], "rank": [0], "max_length": 3}, ([1, 2, 3], True, [1, 1, 1])),
        ({"draft": [3], "argmax": [4, 5], "rank": [1], "max_length": 3}, ([1, 2, 4], True, [1, 1, 0])),
        ({"draft": [3], "argmax": [3, 5], "rank": [0], "max_length": 2}, ([1, 2], True, [1, 1, 0])),
        ({"draft": [3], "argmax": [3, 9], "rank": [0], "max_length": 3}, ([1, 2, 3], True, [1, 1, 1])),
        ({"draft": [3], "argmax": [3, 5], "rank": [0], "finished": True}, ([1, 2], True, [0, 0, 0])),
    ],
)
def test_one_row(ops, case, expected):
    tokens, finished, stats = expected
    assert run(ops, tokens=[1, 2], **case) == (tokens, len(tokens), finished, stats)


def test_rows_are_independent(ops):
    tokens = torch.zeros(3, 6, dtype=torch.int32)
    lengths = torch.tensor([0, 2, 1], dtype=torch.int32)
    finished, stats = torch.zeros(3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.int32)
    addresses = [tensor.data_ptr() for tensor in (tokens, lengths, finished, stats)]
    draft = torch.tensor([[3], [3], [9]], dtype=torch.int32)
    argmax = torch.tensor([[3, 4], [5, 6], [9, 7]], dtype=torch.int32)
    rank = torch.tensor([[0], [1], [0]], dtype=torch.int32)
    ops.accept_and_rollback(tokens, lengths, finished, stats, draft, argmax, rank, 1, EOS, 6)
    assert tokens.tolist() == [[0, 3, 4, 0, 0, 0], [0, 0, 0, 5, 0, 0], [0, 0, 9, 0, 0, 0]]
    assert lengths.tolist() == [2, 3, 2]
    assert finished.tolist() == [False, False, True]
    assert stats.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert [tensor.data_ptr() for tensor in (tokens, lengths, finished, stats)] == addresses


def test_log_probs_go_with_the_tokens(ops):
    """Of drafts that stand their own, of the last token the choice's, and of what is cut off none."""
    tokens, log_probs = torch.zeros(3, 6, dtype=torch.int32), torch.full((3, 6), 9.0)
    lengths = torch.tensor([0, 2, 1], dtype=torch.int32)
    finished, stats = torch.tensor([False, False, True]), torch.zeros(3, 3, dtype=torch.int32)
    draft = torch.tensor([[3, 8], [3, EOS], [3, 3]], dtype=torch.int32)
    argmax = torch.tensor([[3, 4, 5], [7, 6, 6], [3, 3, 3]], dtype=torch.int32)
    rank = torch.tensor([[0, 2], [1, 1], [0, 0]], dtype=torch.int32)
    scores = torch.tensor([10.0, 8.0, 5.0]) + torch.arange(9.0).view(3, 3, 1) * torch.tensor([0, 0.25, 0.5])
    ops.accept_and_rollback(
        *(tokens, lengths, finished, stats, draft, argmax, rank, 2, EOS, 6),
        scores=scores,
        log_probs=log_probs,
    )
    assert tokens.tolist() == [[0, 3, 4, 0, 0, 0], [0, 0, 0, 3, EOS, 0], [0] * 6]
    assert log_probs.tolist() == [
        [9, -5, -1.75, 9, 9, 9],  # draft 0: 5 - 10; choice 1: 8.25 - 10
        [9, 9, 9, -3.5, -3, 9],  # draft 3: 5 + 1.5 - 10, draft 4: 5 + 2 - 10
        [9] * 6,
    ]
