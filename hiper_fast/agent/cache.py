"""The keys and values of sequences being sampled, in blocks of pools, and the passes that read through them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hiper_fast import ops
from hiper_fast.agent import attention
from hiper_fast.agent.head import Head, read_hidden
from hiper_fast.distributed import call_inside, call_whole

Shape = tuple[tuple[int, int], tuple[int, int], torch.dtype]  # [kv_heads, d] of keys, of values


@dataclass(slots=True)
class Pass:
    """The tokens that a pass reads, packed, of each sequence its next ones; and where they go."""

    ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    slots: Tensor  # int64 [tokens]: block * size + place in the block
    blocks: Tensor  # int32 [sequences, most], of each sequence in order; behind its last any
    cu_query: Tensor  # int32 [sequences + 1]
    lengths: Tensor  # int32 [sequences], these tokens among them

    def to(self, device: torch.device) -> Pass:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **tensors)


class PagedCache:
    """Two pools, of keys and of values, for each attention of a model, in the order of its calls."""

    def __init__(self, shapes: list[Shape], count: int, size: int, device: torch.device):
        """`count` blocks of `size` tokens."""
        with torch.device(device):
            self.pools = [
                tuple(torch.empty(count, size, *shape, dtype=dtype) for shape in both)
                for *both, dtype in shapes
            ]
        self.present: Pass | None = None
        self.call = 0  # attention's in a pass

    def read(self, model: PreTrainedModel, head: Head, what: Pass) -> Tensor:
        """The logits [sequences, vocabulary] behind each sequence's last token; a sharded model is whole."""
        self.present, self.call = what, 0
        with attention.through(self):
            return call_whole(model, lambda: self.read_inside(model, head, what))

    def read_inside(self, model: PreTrainedModel, head: Head, what: Pass) -> Tensor:
        hidden = read_tokens(model, what.ids, what.positions, what.cu_query)
        last = hidden.index_select(0, what.cu_query[1:] - 1)
        return head.finish(model.get_output_embeddings()(last))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        keys, values = self.pools[self.call]
        self.call += 1
        what = self.present
        keys.flatten(0, 1).index_copy_(0, what.slots, key)
        values.flatten(0, 1).index_copy_(0, what.slots, value)
        paged = what.blocks, what.cu_query, what.lengths
        return ops.paged_attention(query, keys, values, *paged, **options)


def read_tokens(model: PreTrainedModel, ids: Tensor, positions: Tensor, cu_query: Tensor) -> Tensor:
    """What the model's head reads [tokens, h] of packed tokens, within `attention.through` a cache."""
    return read_hidden(
        model,
        ids[None],
        position_ids=positions[None],
        attention_mask=cu_query.view(1, 1, 1, -1),  # as of packed sequences
        use_cache=False,
    )[0]


class _Recorder:
    """In a cache's place: what the attentions of a model store for a token."""

    def __init__(self):
        self.shapes: list[Shape] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        self.shapes.append((tuple(key.shape[1:]), tuple(value.shape[1:]), key.dtype))
        return query.new_zeros(*query.shape[:2], value.shape[-1])


@torch.no_grad()
def measure_shapes(model: PreTrainedModel) -> list[Shape]:
    """What a cache of this model holds for a token, found by letting it read one."""
    recorder, zero = _Recorder(), torch.zeros(1, dtype=torch.int64, device=model.device)
    cu_query = torch.tensor([0, 1], dtype=torch.int32, device=model.device)
    with attention.through(recorder):
        call_inside(model, lambda: read_tokens(model, zero, zero, cu_query))
    return recorder.shapes


def count_bytes(shapes: list[Shape]) -> int:
    """Of a token."""
    return sum(
        (keys[0] * keys[1] + values[0] * values[1]) * dtype.itemsize
        for keys, values, dtype in shapes
    )
