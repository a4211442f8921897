"""Packed sequences -> microbatches under a token budget, sorted by length so that padding is next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0.1  # at most this share of a microbatch's tokens may be added as padding


@dataclass(slots=True)
class Microbatch:
    """Sequences right-padded to one length. Under a causal mask no real token sees the padding."""

    index: Tensor  # int64 [sequences]: which sequences of the packed batch
    input_ids: Tensor  # int64 [sequences, length]
    lengths: Tensor  # int64 [sequences]


def microbatches(
    ids: Tensor, cu_seqlens: Tensor, token_budget: int, index: Tensor | None = None
) -> Iterator[Microbatch]:
    """Yields every sequence of `index` (default: all non-empty ones) once, longest first.

    ids int64 [tokens]; cu_seqlens int32 [sequences + 1]; a microbatch holds at most `token_budget` tokens, padding
    included, or one sequence.
    """
    lengths = cu_seqlens.diff().long()
    index = lengths.nonzero()[:, 0] if index is None else index
    order = index[lengths[index].argsort(descending=True, stable=True)]
    start = 0
    while start < order.numel():
        longest = int(lengths[order[start]])
        chosen = order[start : start + max(1, token_budget // longest)]
        tokens = lengths[chosen].cumsum(0)
        padding = longest * torch.arange(1, chosen.numel() + 1) - tokens
        chosen = chosen[: int((padding <= tokens * PADDING).sum())]
        start += chosen.numel()
        offsets = torch.arange(longest)
        inside = offsets < lengths[chosen, None]
        padded = ids.new_zeros(chosen.numel(), longest)
        padded[inside] = ids[(cu_seqlens[chosen, None] + offsets)[inside]]
        yield Microbatch(chosen, padded, lengths[chosen])
