"""Sequences without padding: prefix sums and ranges, and microbatches that fill a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

LAST, CANDIDATES = 4, 64  # how the last room of a bin is filled: see `fill_bins`
SPARED = 1 / 32  # of all tokens: where sharing spares less, like lengths meet instead
SEEN = 1 / 16  # of a token's room, for one that is seen and not read: its key and value


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
class Paths:
    """Whole sequences, by the rows of a microbatch where their tokens are read."""

    rows: Tensor  # int64 [tokens of the sequences]
    cu_seqlens: Tensor  # int32 [sequences + 1]
    max_seqlen: int

    def to(self, device: torch.device) -> Paths:
        rows, cu = (x.to(device, non_blocking=True) for x in (self.rows, self.cu_seqlens))
        return replace(self, rows=rows, cu_seqlens=cu)


@dataclass(slots=True)
class Microbatch:
    """Sequences concatenated without padding; what several begin with may be read once, in the first of them.

    Each reads its last token itself.
    """

    index: Tensor  # int64 [sequences]: which sequences of the packed whole; stays on the CPU
    input_ids: Tensor  # int64 [tokens], those that are read
    position_ids: Tensor  # int64 [tokens], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [sequences + 1], of the tokens that each reads itself
    max_seqlen: int
    paths: Paths | None = None  # None: each reads all of its tokens itself

    def to(self, device: torch.device) -> Microbatch:
        tensors = self.input_ids, self.position_ids, self.cu_seqlens
        ids, positions, cu = (tensor.to(device, non_blocking=True) for tensor in tensors)
        paths = self.paths and self.paths.to(device)
        return replace(self, input_ids=ids, position_ids=positions, cu_seqlens=cu, paths=paths)

    @property
    def cu_whole(self) -> Tensor:
        """int32 [sequences + 1], of all tokens of each sequence."""
        return self.cu_seqlens if self.paths is None else self.paths.cu_seqlens

    @property
    def rows(self) -> Tensor:
        """int64: which rows read the tokens of the whole sequences, concatenated."""
        if self.paths is None:
            return torch.arange(len(self.input_ids), device=self.input_ids.device)
        return self.paths.rows

    @property
    def counts(self) -> tuple[int, int]:
        """How many tokens of its sequences are not read, but seen where another one reads them; how many are read."""
        return len(self.rows) - len(self.input_ids), len(self.input_ids)


# One token that belongs to no sequence: what passes through it changes nothing.
BLANK = Microbatch(
    index=torch.empty(0, dtype=torch.int64),
    input_ids=torch.zeros(1, dtype=torch.int64),
    position_ids=torch.zeros(1, dtype=torch.int64),
    cu_seqlens=prefix_sums([1]),
    max_seqlen=1,
)


def microbatches(
    ids: Tensor,
    cu_seqlens: Tensor,
    token_budget: int,
    index: Tensor | None = None,
    *,
    share: bool = False,
) -> Iterator[Microbatch]:
    """Yields every sequence of `index` (default: all non-empty ones) once.

    ids int64 [tokens]; cu_seqlens int32 [sequences + 1]; a microbatch reads at most `token_budget`
    tokens, or one sequence. share: what neighbours in the order of their tokens begin with is read
    once, if that spares enough.
    """
    lengths = cu_seqlens.diff().long()
    index = lengths.nonzero()[:, 0] if index is None else index
    if share and len(index):
        ordered = sort_by_tokens(ids, cu_seqlens, index)
        common = measure_common(ids, cu_seqlens, ordered)
        if common.sum() >= SPARED * lengths[index].sum():
            for begin, end in cut(lengths[ordered].tolist(), common.tolist(), token_budget):
                common[begin] = 0
                yield join(ids, cu_seqlens, ordered[begin:end], common[begin:end])
            return
    for places in fill_bins(lengths[index].tolist(), token_budget):
        yield join(ids, cu_seqlens, index[places], torch.zeros(len(places), dtype=torch.int64))


def locate(cu_seqlens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """int64: where the sequences `chosen` begin, and their lengths."""
    starts = cu_seqlens[chosen].long()
    return starts, cu_seqlens[chosen + 1] - starts


def join(ids: Tensor, cu_seqlens: Tensor, chosen: Tensor, common: Tensor) -> Microbatch:
    """The sequences `chosen`, of which each begins with `common` tokens of the one before."""
    starts, lengths = locate(cu_seqlens, chosen)
    own = lengths - common
    return Microbatch(
        index=chosen,
        input_ids=ids[ranges(starts + common, own)],
        position_ids=ranges(common, own),
        cu_seqlens=prefix_sums(own),
        max_seqlen=int(own.max()),
        paths=trace(lengths, common) if common.any() else None,
    )


def trace(lengths: Tensor, common: Tensor) -> Paths:
    """For sequences of `lengths` that begin with `common` tokens of the one before and read the others."""
    paths, path, row = [], np.empty(0, dtype=np.int64), 0
    for length, shared in zip(lengths.tolist(), common.tolist(), strict=True):
        own = np.arange(row, row + length - shared)
        path = np.concatenate([path[:shared], own])
        paths.append(path)
        row += len(own)
    rows = torch.from_numpy(np.concatenate(paths))
    return Paths(rows, prefix_sums(lengths), int(lengths.max()))


def sort_by_tokens(ids: Tensor, cu_seqlens: Tensor, index: Tensor) -> Tensor:
    """`index` in the order of the sequences' tokens, as words in a dictionary."""
    tokens, cu = ids.numpy(), cu_seqlens.tolist()
    # Bytes that sort as their numbers do.
    words = {i: tokens[cu[i] : cu[i + 1]].astype(">i8").tobytes() for i in index.tolist()}
    return torch.tensor(sorted(words, key=words.__getitem__))


def measure_common(ids: Tensor, cu_seqlens: Tensor, index: Tensor) -> Tensor:
    """int64: with how many tokens of the sequence before in `index` each begins; never its last one."""
    starts, lengths = locate(cu_seqlens, index)
    most = torch.minimum(lengths[1:] - 1, lengths[:-1]).clamp_(min=0)
    ends = most.cumsum(0)
    differs = ids[ranges(starts[1:], most)] != ids[ranges(starts[:-1], most)]
    breaks = torch.cat([differs.nonzero()[:, 0], ends[-1:]])
    first = breaks[torch.searchsorted(breaks, ends - most)]  # of each pair, or of a later one
    return torch.cat([most.new_zeros(1), torch.minimum(first, ends) - (ends - most)])


def cut(lengths: list[int], common: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences, from begin to end, with room for what they read and see in `budget` tokens, or of one."""
    begin, room = 0, budget
    for i, (length, shared) in enumerate(zip(lengths, common, strict=True)):
        room -= length - shared + shared * SEEN
        if room < 0 and i > begin:
            yield begin, i
            begin, room = i, budget - length
    yield begin, len(lengths)


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
