"""Which rows of packed hidden states learning reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config
from hiper_fast.distributed import World
from hiper_fast.packing import Microbatch, find_ranges, microbatches, ranges
from hiper_fast.rollout.trajectory import Sequences


def divide(
    agent: Agent, config: Config, ids: Tensor, cu_seqlens: Tensor, index: Tensor | None = None
) -> Iterator[Microbatch]:
    """`microbatches` of the size that the run asks for; what sequences begin with is read once, if it may be."""
    share = config.train.share_prefixes and agent.shares_prefixes
    return microbatches(ids, cu_seqlens, config.train.microbatch_tokens, index, share=share)


def measure_spared(world: World, counts: Iterable[tuple[int, int]]) -> float:
    """The share of tokens that are seen and not read, by the `Microbatch.counts` of all processes."""
    spared, read = world.sum(torch.tensor([(0, 0), *counts]).sum(0)).tolist()
    return spared / max(1, spared + read)


class Rows:
    """Which rows of a microbatch's hidden states predict its loss tokens and give its values.

    Values have places: the turns, or, with `token_values`, the response tokens.
    """

    def __init__(self, sequences: Sequences, batch: Microbatch, loss_mask: Tensor):
        tokens, shift = find_within(sequences, batch, sequences.token_index)
        trained = loss_mask[tokens]
        self.tokens = tokens[trained]  # [rows], which response tokens
        places = (sequences.token_index[tokens] + shift)[trained]
        self.token_rows = batch.rows[places - 1]  # [rows]
        self.sequences = find_ranges(
            sequences.token_index[self.tokens], sequences.cu_seqlens
        )  # [rows], whose they are
        self.places, shift = find_within(sequences, batch, sequences.value_index[:, -1])
        places = sequences.value_index[self.places] + shift[:, None]
        self.value_rows = batch.rows[places]  # [places, 3 or 1]

    @staticmethod
    def take_values(values: Tensor) -> Tensor:
        """Each head at its own position, or all at the only one: [places, 3 or 1, 3 heads] -> [places, 3]."""
        return values[:, 0] if values.shape[1] == 1 else values.diagonal(dim1=1, dim2=2)


def find_within(
    sequences: Sequences, batch: Microbatch, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the ascending `positions` lie in the batch; for each, what takes it to its place among its sequences."""
    edges = torch.searchsorted(positions.contiguous(), sequences.cu_seqlens.long())
    counts = edges.diff()[batch.index]
    shift = batch.cu_whole[:-1] - sequences.cu_seqlens[batch.index]
    return ranges(edges[batch.index], counts), shift.long().repeat_interleave(counts)
