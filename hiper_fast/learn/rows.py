"""Which rows of packed hidden states learning reads."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.packing import Microbatch, find_ranges, ranges
from hiper_fast.rollout.trajectory import Sequences


class Rows:
    """Which rows of a microbatch's hidden states predict its loss tokens and give its values.

    Values have places: the turns, or, with `token_values`, the response tokens.
    """

    def __init__(self, sequences: Sequences, batch: Microbatch, loss_mask: Tensor):
        tokens, shift = find_within(sequences, batch, sequences.token_index)
        trained = loss_mask[tokens]
        self.tokens = tokens[trained]  # [rows], which response tokens
        self.token_rows = (sequences.token_index[tokens] + shift)[trained] - 1  # [rows]
        self.sequences = find_ranges(
            sequences.token_index[self.tokens], sequences.cu_seqlens
        )  # [rows], whose they are
        self.places, shift = find_within(sequences, batch, sequences.value_index[:, -1])
        self.value_rows = sequences.value_index[self.places] + shift[:, None]  # [places, 3 or 1]

    @staticmethod
    def take_values(values: Tensor) -> Tensor:
        """Each head at its own position, or all at the only one: [places, 3 or 1, 3 heads] -> [places, 3]."""
        return values[:, 0] if values.shape[1] == 1 else values.diagonal(dim1=1, dim2=2)


def find_within(
    sequences: Sequences, batch: Microbatch, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the ascending `positions` lie in the batch; for each, what takes it to its row there."""
    edges = torch.searchsorted(positions.contiguous(), sequences.cu_seqlens.long())
    counts = edges.diff()[batch.index]
    shift = batch.cu_seqlens[:-1] - sequences.cu_seqlens[batch.index]
    return ranges(edges[batch.index], counts), shift.long().repeat_interleave(counts)
