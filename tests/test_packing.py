"""Microbatches: every sequence once, whole and unpadded, under a budget that is used."""

import random

import pytest
import torch

from hiper_fast.packing import SEEN, choose_fill, fill_bins, microbatches, prefix_sums


def packed(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1000, (sum(lengths),), generator=generator), prefix_sums(lengths)


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
        sequences = [ids[cu[i] : cu[i + 1]] for i in batch.index.tolist()]
        sizes = [len(s) for s in sequences]
        assert torch.equal(batch.input_ids, torch.cat(sequences)), (
            "concatenated, nothing between them"
        )
        assert torch.equal(batch.position_ids, torch.cat([torch.arange(n) for n in sizes]))
        assert (
            torch.equal(batch.cu_seqlens, prefix_sums(sizes))
            and batch.cu_seqlens.dtype == torch.int32
        )
        assert batch.max_seqlen == max(sizes)
        assert sum(sizes) <= budget or len(sizes) == 1
    assert sorted(seen) == [i for i, length in enumerate(lengths) if length]


def unfold(batch):
    """The whole sequences of a microbatch, and the positions of their tokens."""
    sizes = batch.cu_whole.diff().tolist()
    return (x[batch.rows].split(sizes) for x in (batch.input_ids, batch.position_ids))


@pytest.mark.parametrize("budget", [1, 8, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_shared_sequences_are_whole_once_and_under_the_budget(budget, seed):
    rng = random.Random(seed)
    words = [[rng.randint(0, 1) for _ in range(rng.randint(0, 12))] for _ in range(60)]
    ids, cu = torch.tensor(sum(words, [])), prefix_sums([len(word) for word in words])
    seen = []
    for batch in microbatches(ids, cu, budget, share=True):
        seen += batch.index.tolist()
        sequences, positions = unfold(batch)
        for i, sequence, position in zip(batch.index, sequences, positions, strict=True):
            assert sequence.tolist() == words[i]
            assert torch.equal(position, torch.arange(len(position)))
        own = batch.cu_seqlens.diff()
        assert own.min() > 0 and batch.max_seqlen == own.max() and own.sum() == len(batch.input_ids)
        if batch.paths is not None:
            assert batch.paths.max_seqlen == batch.cu_whole.diff().max()
        assert len(batch.input_ids) <= budget or len(batch.index) == 1
    assert sorted(seen) == [i for i, word in enumerate(words) if word]


def test_what_sequences_begin_with_is_read_once():
    """The best there is where all fit: a token for each different beginning, and the last one of an equal sequence."""
    words = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 2, 3], [1, 2], [1, 2, 3, 4], [1, 9]]
    ids, cu = torch.tensor(sum(words, [])), prefix_sums([len(word) for word in words])
    (batch,) = microbatches(ids, cu, 100, share=True)
    assert [words[i] for i in batch.index] == sorted(words)
    beginnings = {tuple(word[: n + 1]) for word in words for n in range(len(word))}
    assert len(batch.input_ids) == len(beginnings) + 1


def test_where_little_is_shared_like_lengths_meet():
    ids, cu = packed([30, 90] * 60)
    ids[cu[:-1].long()] = 1  # all begin alike, with one token of many
    for whole, shared in zip(
        microbatches(ids, cu, 900), microbatches(ids, cu, 900, share=True), strict=True
    ):
        assert torch.equal(whole.input_ids, shared.input_ids) and shared.paths is None


def test_what_is_seen_again_takes_room_too():
    """Of keys and values, where much is shared."""
    words = [[1] * 160 + [word] for word in range(100)]
    ids, cu = torch.tensor(sum(words, [])), prefix_sums([161] * 100)
    for batch in microbatches(ids, cu, 200, share=True):
        seen, read = batch.counts
        assert seen + read == int(batch.cu_whole[-1]) and read == len(batch.input_ids)
        assert len(batch.input_ids) + seen * SEEN <= 200


def clipped(low, high, draw):
    return lambda: int(min(high, max(low, draw())))


rng = random.Random(0)
MIXES = {  # tokens of a sequence as runs have them, and the budgets they are given
    "tiny": (clipped(62, 170, lambda: rng.gauss(105, 16)), [4096, 8192]),
    "alfworld": (clipped(380, 1700, lambda: rng.gauss(778, 160)), [4096, 8192, 16384]),
    "alfworld, skewed": (
        clipped(380, 1700, lambda: 380 + rng.lognormvariate(5.9, 0.5)),
        [8192, 16384],
    ),
    "webshop": (clipped(500, 4096, lambda: rng.lognormvariate(7.2, 0.5)), [8192, 32768]),
    "trajectories": (clipped(1500, 24000, lambda: rng.lognormvariate(8.8, 0.7)), [32768]),
}


@pytest.mark.parametrize("number", [256, 1500])
@pytest.mark.parametrize("draw, budgets", MIXES.values(), ids=MIXES.keys())
def test_full_bins_waste_less_than_two_percent(draw, budgets, number):
    lengths = [draw() for _ in range(number)]
    for budget in budgets:
        loads = [sum(lengths[i] for i in bin) for bin in fill_bins(lengths, budget)]
        *full, _ = loads
        assert sum(full) >= 0.98 * budget * len(full)


def test_like_lengths_meet():
    """Where bins can hold many: attention without a varlen kernel pads to the longest of a group."""
    ids, cu = packed([30, 90] * 60)
    batches = list(microbatches(ids, cu, 900))
    alike = sum(len(set(batch.cu_seqlens.diff().tolist())) == 1 for batch in batches)
    assert alike >= 0.5 * len(batches)


def test_the_chosen_fill_is_the_best_there_is():
    for lengths, room in (
        ([5, 4, 3], 7),
        ([5, 4, 3], 2),
        ([], 9),
        ([9, 9, 2], 11),
        ([6, 5, 5], 10),
        ([3], 3),
    ):
        subsets = [
            [k for k in range(len(lengths)) if bits >> k & 1] for bits in range(1 << len(lengths))
        ]
        best = max(s for s in (sum(lengths[k] for k in subset) for subset in subsets) if s <= room)
        chosen = choose_fill(lengths, room)
        assert sum(lengths[k] for k in chosen) == best and chosen == sorted(set(chosen))


def test_only_the_chosen_sequences():
    ids, cu = packed([5, 6, 7, 8])
    seen = [i for b in microbatches(ids, cu, 14, torch.tensor([3, 0])) for i in b.index.tolist()]
    assert sorted(seen) == [0, 3]


def test_nothing_to_do():
    ids, cu = packed([5, 6])
    empty = torch.tensor([], dtype=torch.int64)
    for share in (False, True):
        assert list(microbatches(ids, cu, 8, empty, share=share)) == []
        assert list(microbatches(*packed([]), 8, share=share)) == []
        assert list(microbatches(*packed([0, 0]), 8, share=share)) == []
