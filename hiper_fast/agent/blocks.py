"""Which blocks of a cache hold which tokens: sequences that begin alike share what they have in common.

Paged memory after Kwon et al., arXiv 2309.06180; blocks are found by what they hold.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

ROOT = 0  # what a sequence's first block follows

Key = tuple[int, tuple[int, ...]]  # what a full block follows, and its tokens


class Blocks:
    """`count` blocks of `size` tokens, from number `first` on.

    A block that no sequence holds any more keeps its tokens until it is needed, the longest unused first.
    """

    def __init__(self, count: int, size: int, first: int = 0):
        self.size = size
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, first + count))
        self.holders: dict[int, int] = {}  # block -> how many sequences
        self.known: dict[Key, int] = {}  # -> block
        self.names: dict[int, tuple[int, Key]] = {}  # block -> its number as one to follow, its key
        self.next_name = ROOT + 1

    def take(
        self, ids: Sequence[int], room: int, most: float = math.inf
    ) -> tuple[list[int], int] | None:
        """Blocks for a sequence of at most `room` tokens that begins with `ids`, and how many of these they hold.

        Those that they do not hold count as held from now on: they are to be read at once, the last one always. None
        if they are more than `most`, or too few blocks are free.
        """
        shared = list(self.find(ids[:-1]))
        if len(ids) - len(shared) * self.size > most:
            return None
        kept = sum(block in self.free for block in shared)
        needed = -(-room // self.size) - len(shared)
        if needed > len(self.free) - kept:
            return None
        for block in shared:
            self.free.pop(block, None)
        blocks = shared + [self.take_free() for _ in range(needed)]
        for block in blocks:
            self.holders[block] = self.holders.get(block, 0) + 1
        self.note(ids, blocks)
        return blocks, len(shared) * self.size

    def take_free(self) -> int:
        block, _ = self.free.popitem(last=False)
        if block in self.names:
            del self.known[self.names.pop(block)[1]]
        return block

    def find(self, ids: Sequence[int]) -> Iterator[int]:
        """The blocks that hold the beginning of `ids`."""
        name = ROOT
        for tokens in self.split(ids):
            block = self.known.get((name, tokens))
            if block is None:
                return
            yield block
            name = self.names[block][0]

    def note(self, ids: Sequence[int], blocks: Sequence[int]) -> None:
        """That `blocks` hold `ids`: their full ones can be shared."""
        name = ROOT
        for block, tokens in zip(blocks, self.split(ids), strict=False):
            key = name, tokens
            if key not in self.known:
                self.known[key] = block
                self.names[block] = self.next_name, key
                self.next_name += 1
            name = self.names[self.known[key]][0]

    def split(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The tokens of each full block."""
        for begin in range(0, len(ids) - self.size + 1, self.size):
            yield tuple(ids[begin : begin + self.size])

    def give_back(self, blocks: Sequence[int]) -> None:
        """One sequence holds them no more."""
        for block in reversed(blocks):  # a sequence's end is less likely to be shared
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.free[block] = None

    def forget(self) -> None:
        """What they hold is of former weights."""
        self.known.clear()
        self.names.clear()
