"""Sequences -> microbatches that fill a token budget, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiper_fast.trajectory import prefix_sums, ranges

LAST, CANDIDATES = 4, 64  # how the last room of a bin is filled: see `bins`


@dataclass(slots=True)
class Microbatch:
    """Sequences concatenated without padding, the longest first."""

    index: Tensor  # int64 [sequences]: which sequences of the packed whole; stays on the CPU
    input_ids: Tensor  # int64 [tokens]
    position_ids: Tensor  # int64 [tokens], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [sequences + 1]
    max_seqlen: int

    def to(self, device: torch.device) -> Microbatch:
        names = "input_ids", "position_ids", "cu_seqlens"
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


BLANK = Microbatch(torch.empty(0, dtype=torch.int64), *torch.zeros(2, 1, dtype=torch.int64), prefix_sums([1]), 1)
# one token that belongs to no sequence: what passes through it changes nothing


def microbatches(
    ids: Tensor, cu_seqlens: Tensor, token_budget: int, index: Tensor | None = None
) -> Iterator[Microbatch]:
    """Yields every sequence of `index` (default: all non-empty ones) once.

    ids int64 [tokens]; cu_seqlens int32 [sequences + 1]; a microbatch holds at most `token_budget` tokens, or one
    sequence.
    """
    lengths = cu_seqlens.diff().long()
    index = lengths.nonzero()[:, 0] if index is None else index
    for bin in bins(lengths[index].tolist(), token_budget):
        chosen = index[bin]
        starts, sizes = cu_seqlens[chosen].long(), lengths[chosen]
        rows = ranges(starts, sizes)
        yield Microbatch(
            index=chosen,
            input_ids=ids[rows],
            position_ids=rows - starts.repeat_interleave(sizes),
            cu_seqlens=prefix_sums(sizes),
            max_seqlen=int(sizes.max()),
        )


def bins(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of `lengths`, every one once, in bins of at most `budget` in sum, or of one length above it.

    A bin takes the longest that are left, so that like lengths meet, until it has room for fewer than LAST of them;
    that room is filled as exactly as some of CANDIDATES others, of all lengths, can fill it.
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
        places = [p for p in places if lengths[left[p]] <= room]
        for k in best_fill([lengths[left[p]] for p in places], room):  # from the end of `left` on: its places stay
            bin.append(left.pop(places[k]))
        filled.append(bin)
    return filled


def best_fill(lengths: list[int], room: int) -> list[int]:
    """Ascending indices of the lengths whose sum comes nearest to `room` from below."""
    sums = [1]  # after k lengths: bit s is set if some of them sum to s
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & (2 << room) - 1)
    left, chosen = sums[-1].bit_length() - 1, []
    for k in reversed(range(len(lengths))):
        if not sums[k] >> left & 1:
            chosen.append(k)
            left -= lengths[k]
    return chosen[::-1]
