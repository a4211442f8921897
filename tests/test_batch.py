"""Microbatches: every sequence once, under the budget, with its own tokens."""

import pytest
import torch

from hiper_fast.batch import PADDING, microbatches
from hiper_fast.trajectory import prefix_sums


def packed(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1000, (sum(lengths),), generator=generator), prefix_sums(lengths)


def sequence(ids, cu, i):
    return ids[int(cu[i]) : int(cu[i + 1])]


CASES = {
    "one": [5],
    "one token": [1],
    "equal": [4] * 9,
    "odd": [7, 1, 300, 2, 2, 65, 31, 7, 1],
    "with empty ones": [0, 3, 0, 0, 8, 0],
    "long tail": [1] * 40 + [200],
}


@pytest.mark.parametrize("budget", [1, 8, 64, 10_000])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_every_sequence_once_whole_and_under_the_budget(lengths, budget):
    ids, cu = packed(lengths)
    seen = []
    for batch in microbatches(ids, cu, budget):
        seen += batch.index.tolist()
        assert batch.input_ids.shape == (len(batch.index), int(batch.lengths.max()))
        assert batch.input_ids.numel() <= budget or len(batch.index) == 1
        for row, i, length in zip(batch.input_ids, batch.index.tolist(), batch.lengths.tolist(), strict=True):
            assert torch.equal(row[:length], sequence(ids, cu, i))
            assert not row[length:].any()
    assert sorted(seen) == [i for i, length in enumerate(lengths) if length]


def test_budget_is_used():
    ids, cu = packed([10] * 10)
    assert [len(b.index) for b in microbatches(ids, cu, 40)] == [4, 4, 2]


def test_longest_first_so_that_padding_is_little():
    ids, cu = packed([3, 9, 3, 9, 3, 9])
    batches = list(microbatches(ids, cu, 27))
    assert [b.lengths.tolist() for b in batches] == [[9, 9, 9], [3, 3, 3]]
    assert sum(b.input_ids.numel() for b in batches) == ids.numel()


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_one_long_sequence_does_not_pad_the_others(lengths):
    ids, cu = packed(lengths)
    for batch in microbatches(ids, cu, 10_000):
        assert batch.input_ids.numel() <= batch.lengths.sum() * (1 + PADDING)


def test_only_the_chosen_sequences():
    ids, cu = packed([5, 6, 7, 8])
    seen = [i for b in microbatches(ids, cu, 14, torch.tensor([3, 0])) for i in b.index.tolist()]
    assert sorted(seen) == [0, 3]


def test_nothing_to_do():
    ids, cu = packed([5, 6])
    empty = torch.tensor([], dtype=torch.int64)
    assert list(microbatches(ids, cu, 8, empty)) == []
    assert list(microbatches(*packed([]), 8)) == []
    assert list(microbatches(*packed([0, 0]), 8)) == []
