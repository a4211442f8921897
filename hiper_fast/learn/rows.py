"""Which rows of packed hidden states learning reads."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.estimators import HIGH
from hiper_fast.packing import Microbatch, ranges
from hiper_fast.rollout.trajectory import Sequences


class Rows:
    """Which rows of a microbatch's hidden states predict its loss tokens and give its values."""

    def __init__(self, sequences: Sequences, batch: Microbatch, loss_mask: Tensor):
        tokens, shift = find_within(sequences, batch, sequences.token_index)
        trained = loss_mask[tokens]
        self.tokens = tokens[trained]  # [rows], which response tokens
        self.token_rows = (sequences.token_index[tokens] + shift)[trained] - 1  # [rows]
        self.turns, shift = find_within(sequences, batch, sequences.value_index[:, HIGH])
        self.value_rows = sequences.value_index[self.turns] + shift[:, None]  # [turns, 3]

    @staticmethod
    def take_values(values: Tensor) -> Tensor:
        """Each head at its own position: [turns, 3 positions, 3 heads] -> [turns, 3]."""
        return values.diagonal(dim1=1, dim2=2)


def find_within(
    sequences: Sequences, batch: Microbatch, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the ascending `positions` lie in the batch; for each, what takes it to its row there."""
    edges = torch.searchsorted(positions.contiguous(), sequences.cu_seqlens.long())
    counts = edges.diff()[batch.index]
    shift = batch.cu_seqlens[:-1] - sequences.cu_seqlens[batch.index]
    return ranges(edges[batch.index], counts), shift.long().repeat_interleave(counts)
