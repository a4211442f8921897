"""Sequences without padding: prefix sums and ranges, and microbatches that fill a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAST, CANDIDATES = 4, 64  # how the last room of a bin is filled: see `fill_bins`


def prefix_sums(lengths) -> Tensor:
    """int32 exclusive prefix sums `[0, l0, l0 + l1, …]`."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64: `lengths[0]` numbers from `starts[0]` on, then those of `starts[1]`, and so on."""
    shifts = starts - lengths.cumsum(0) + lengths
    places = torch.arange(int(lengths.sum()), device=starts.device)
    return places + shifts.repeat_interleave(lengths)


def spread(values: Tensor, cu: Tensor) -> Tensor:
    """int64: `values[i]` for every element of range `i`."""
    return values.long().repeat_interleave(cu.diff())


def find_ranges(places: Tensor, cu: Tensor) -> Tensor:
    """int64: which of the ranges that `cu` [ranges + 1] bounds holds each of `places`."""
    return torch.searchsorted(cu.long(), places, right=True) - 1


def interleave(a: Tensor, cu_a: Tensor, b: Tensor, cu_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins ranges `i` of `a` and of `b`, for every `i`: a packed tensor and its prefix sums."""
    cu = cu_a + cu_b
    out = a.new_empty(int(cu[-1]))
    out[torch.arange(a.numel()) + spread(cu_b[:-1], cu_a)] = a
    out[torch.arange(b.numel()) + spread(cu_a[1:], cu_b)] = b
    return out, cu


@dataclass(slots=True)
class Microbatch:
    """Sequences concatenated without padding, the longest first."""

    index: Tensor  # int64 [sequences]: which sequences of the packed whole; stays on the CPU
    input_ids: Tensor  # int64 [tokens]
    position_ids: Tensor  # int64 [tokens], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [sequences + 1]
    max_seqlen: int

    def to(self, device: torch.device) -> Microbatch:
        tensors = self.input_ids, self.position_ids, self.cu_seqlens
        ids, positions, cu = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return replace(self, input_ids=ids, position_ids=positions, cu_seqlens=cu)


# One token that belongs to no sequence: what passes through it changes nothing.
BLANK = Microbatch(
    index=torch.empty(0, dtype=torch.int64),
    input_ids=torch.zeros(1, dtype=torch.int64),
    position_ids=torch.zeros(1, dtype=torch.int64),
    cu_seqlens=prefix_sums([1]),
    max_seqlen=1,
)


def microbatches(
    ids: Tensor, cu_seqlens: Tensor, token_budget: int, index: Tensor | None = None
) -> Iterator[Microbatch]:
    """Yields every sequence of `index` (default: all non-empty ones) once.

    ids int64 [tokens]; cu_seqlens int32 [sequences + 1]; a microbatch holds at most `token_budget`
    tokens, or one sequence.
    """
    lengths = cu_seqlens.diff().long()
    index = lengths.nonzero()[:, 0] if index is None else index
    for places in fill_bins(lengths[index].tolist(), token_budget):
        chosen = index[places]
        starts, sizes = cu_seqlens[chosen].long(), lengths[chosen]
        rows = ranges(starts, sizes)
        yield Microbatch(
            index=chosen,
            input_ids=ids[rows],
            position_ids=rows - starts.repeat_interleave(sizes),
            cu_seqlens=prefix_sums(sizes),
            max_seqlen=int(sizes.max()),
        )


def fill_bins(lengths: list[int], budget: int) -> list[list[int]]:
    """Each index of `lengths` once, in bins of at most `budget` in sum, or of one above it.

    A bin takes the longest that are left, so that like lengths meet, until it has room for fewer
    than LAST of them; that room is filled as exactly as some of CANDIDATES others, of all lengths,
    can fill it.
    """
    left = sorted(range(len(lengths)), key=lambda i: lengths[i])
    filled = []
    while left:
        bin = [left.pop()]
        room = budget - lengths[bin[0]]
        while left and room >= LAST * lengths[left[-1]]:
            bin.append(left.pop())
            room -= lengths[bin[-1]]
        places = range(len(left) - 1, -1, -max(1, len(left) // CANDIDATES))
        places = [place for place in places if lengths[left[place]] <= room]
        sizes = [lengths[left[place]] for place in places]
        for chosen in choose_fill(sizes, room):
            bin.append(left.pop(places[chosen]))  # from the end of `left` on: its places stay
        filled.append(bin)
    return filled


def choose_fill(lengths: list[int], room: int) -> list[int]:
    """Ascending indices of the lengths whose sum comes nearest to `room` from below."""
    sums = [1]  # after each length: bit s is set if some of those so far sum to s
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & (2 << room) - 1)
    left, chosen = sums[-1].bit_length() - 1, []
    for place in reversed(range(len(lengths))):
        if not sums[place] >> left & 1:
            chosen.append(place)
            left -= lengths[place]
    return chosen[::-1]
