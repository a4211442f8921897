"""Causal attention over packed sequences, for models that use transformers' AttentionInterface.

A call whose mask holds cu_seqlens is packed: a kernel of `varlen` attends if one can, in half precision
on a GPU; elsewhere scaled_dot_product_attention over sequences of like length. Soft-capped scores (but
for flash-attn, which has them) and sinks are computed as written.
Within `through` a packed call is one of sampling: what it attends to is the cache's to say. Other
calls, of a mask or none, are transformers' own sdpa.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hiper_fast.agent import varlen
from hiper_fast.options import ConfigError
from hiper_fast.packing import Microbatch, ranges

NAME = "hiper_fast_packed"
LAYERS = {"full_attention", "sliding_attention"}
PADDING = (
    0.1  # of a group's tokens, where scaled_dot_product_attention needs sequences of one length
)


class Cache(Protocol):
    """What sampling attends to."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """Stores the next layer's key and value [tokens, kv_heads, d]; query [tokens, heads, d] to them and their past.

        options: scale, window, softcap, sinks.
        """


_present = threading.local()  # its `cache`: that of the `through` around a call


@contextlib.contextmanager
def through(cache: Cache) -> Iterator[None]:
    """Within, packed calls store their keys and values in `cache` and attend to it."""
    _present.cache = cache
    try:
        yield
    finally:
        del _present.cache


class Witness:
    """In a cache's place: finds what a model's packed passes attend by."""

    def __init__(self):
        self.choices: dict[varlen.Choice, None] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        choice = varlen.choose(query, value, options.get("softcap"), options.get("sinks"))
        self.choices[choice] = None
        return query.new_zeros(*query.shape[:2], value.shape[-1])


def use(model: PreTrainedModel) -> None:
    """Makes `model` attend by this module; ConfigError if its token mixing cannot be packed."""
    check_mixing(model)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        refuse(model, "has token mixing other than plain attention")


def check_mixing(model: PreTrainedModel) -> None:
    """ConfigError for what a model's configuration says that packing cannot do."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    other = set(kinds or ()) - LAYERS
    if other:
        refuse(model, f"has layers of type {', '.join(sorted(other))}")
    if getattr(model, "_is_stateful", False):
        refuse(model, "has recurrent layers")
    if any(field.startswith("index") and value for field, value in vars(config).items()):
        refuse(model, "chooses by an index what it attends to")
    if getattr(config, "attn_temperature_tuning", False):
        refuse(model, "scales attention by a token's place in the batch")


def heed_cap(model: PreTrainedModel) -> None:
    """Makes `model`, as it came, cap its scores as its configuration says: transformers 5.17's sdpa leaves that out."""
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def refuse(model: PreTrainedModel, what: str) -> NoReturn:
    raise ConfigError(
        f"model.path: {type(model).__name__} {what}, which cannot read packed sequences; "
        "use a model of full or sliding causal attention, such as Qwen2.5, Qwen3 or Llama"
    )


class Packing:
    """Of packed sequences, which tokens a token sees: those of its sequence up to itself, `rows` of keys and values."""

    def __init__(
        self,
        cu_queries: Tensor,
        cu_keys: Tensor,
        rows: Tensor | None,
        longest: tuple[int, int] | None = None,
    ):
        """cu_queries, cu_keys: int32 [sequences + 1], of the last tokens of each, which are read, and of all; rows:
        int64 [all tokens], where those are read, None: all are; longest: of both."""
        self.cu, self.rows = (cu_queries, cu_keys), rows
        self.longest = longest or tuple(int(cu.diff().max()) for cu in self.cu)

    @classmethod
    def of(cls, batch: Microbatch) -> Packing:
        if batch.paths is None:
            return cls(batch.cu_seqlens, batch.cu_seqlens, None, (batch.max_seqlen,) * 2)
        paths = batch.paths
        longest = batch.max_seqlen, paths.max_seqlen
        return cls(batch.cu_seqlens, paths.cu_seqlens, paths.rows, longest)

    def write(self) -> Tensor:
        """As a mask, int32 [1, 1, 1, numbers]: cu_seqlens; or, negative, how many of both, both, and `rows`."""
        queries, keys = self.cu
        if self.rows is None:
            return queries.view(1, 1, 1, -1)
        count = queries.new_full((1,), -len(queries))
        return torch.cat([count, queries, keys, self.rows.int()]).view(1, 1, 1, -1)

    @classmethod
    def read(cls, mask: Tensor) -> Packing:
        """What `write` wrote."""
        numbers = mask.flatten()
        count = -int(numbers[0])
        if not count:
            return cls(numbers, numbers, None)
        queries, keys, rows = numbers[1:].tensor_split([count, 2 * count])
        return cls(queries.contiguous(), keys.contiguous(), rows.long())

    def take(self, states: Tensor) -> Tensor:
        """Of states [tokens, heads, d] those of whole sequences [all tokens, heads, d]."""
        return states if self.rows is None else select(states, self.rows)

    @functools.cached_property
    def groups(self) -> Groups:
        """For a back end that needs batches."""
        queries, keys = self.cu
        groups = group_lengths(keys)
        if self.rows is not None:
            own = queries.diff()
            read = ranges(keys[1:] - own, own)
            groups.rows, groups.places = self.rows[groups.rows], groups.places[read]
        return groups


def select(states: Tensor, rows: Tensor) -> Tensor:
    """states[rows]; gradients of a row that is taken often are summed in float32."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return states.to(wide).index_select(0, rows).to(states.dtype)


def describe_packing(batch: Microbatch) -> dict:
    """What a forward gets beside ids and positions, so that its attention keeps sequences apart.

    Every model hands the mask to its attention, of four dimensions, so that no other is made. Not all
    hand on the rest, which only spares each layer from finding it again.
    """
    packing = Packing.of(batch)
    return {"attention_mask": packing.write(), "packing": packing}


def attend(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, sliding_window=None,
    softcap=None, s_aux=None, packing=None, **options,
):  # fmt: skip
    """The function registered with transformers -> ([batch, tokens, heads, d], None).

    query [batch, heads, tokens, d]; key and value of as many heads or fewer. attention_mask: of
    packed sequences what `Packing.write` makes, int32; else bool or None. softcap: of the scores.
    s_aux [heads]: scores of sinks, which take their share and give nothing.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    extras = {"softcap": softcap, "sinks": s_aux}
    extras = {name: extra for name, extra in extras.items() if extra is not None}
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        check_plain(module, dropout, options)
        states = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
        if (cache := getattr(_present, "cache", None)) is not None:
            return cache.attend(*states, scale=scale, window=sliding_window, **extras)[None], None
        packing = Packing.read(attention_mask) if packing is None else packing
        window = sliding_window if sliding_window and sliding_window < packing.longest[1] else None
        out = attend_packed(*states, packing, scale, window, **extras)
        return out[None], None
    if extras:
        if attention_mask is None:
            attention_mask = make_mask(query.shape[2], key.shape[2], None, query.device)
        out = attend_by_scores(query, key, value, attention_mask, scale, **extras)
        return out.transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


def check_plain(module, dropout: float, options: dict) -> None:
    """ConfigError for a packed call whose attention is not softmax over the past."""
    causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
    odd = ["position_bias"] if options.get("position_bias") is not None else []
    odd += ["attention_dropout"] if dropout else []
    odd += [] if causal else ["attention in both directions"]
    if odd:
        raise ConfigError(
            f"model.path: packed attention cannot do this model's {', '.join(odd)}; "
            "use another model"
        )


def attend_packed(
    query, key, value, packing: Packing, scale, window, softcap=None, sinks=None
) -> Tensor:
    """query [tokens, heads, d] -> [tokens, heads, d], by a kernel if one can, else in groups."""
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if kernel := varlen.choose(query, value, softcap, sinks).kernel:
        capped = {} if softcap is None else {"softcap": softcap}
        states = query, packing.take(key), packing.take(value)
        return varlen.call(kernel, *states, packing.cu, packing.longest, scale, window, **capped)
    return attend_in_groups(query, key, value, packing.groups, scale, window, softcap, sinks)


@dataclass(slots=True)
class Groups:
    """How packed sequences become right-padded batches, each of like lengths, and come back.

    The padding of a sequence is whatever follows it: under a causal mask none of its tokens sees
    that.
    """

    shapes: list[tuple[int, int]]  # (sequences, longest) of each batch
    rows: Tensor  # int64 [places of all batches]: the packed row that stands there
    places: Tensor  # int64 [tokens]: where each packed row stands, as a query


def group_lengths(cu_seqlens: Tensor) -> Groups:
    """Groups of at most PADDING for the sequences of cu_seqlens int32 [sequences + 1]."""
    cu = cu_seqlens.cpu().long()
    lengths, tokens = cu.diff(), int(cu[-1])  # [sequences]
    order = lengths.argsort(descending=True, stable=True)
    shapes, rows, first_places = [], [], torch.empty_like(lengths)
    begin = place = 0
    while begin < len(order):
        longest = max(1, int(lengths[order[begin]]))
        rest = order[begin:]
        sums = lengths[rest].cumsum(0)  # [rest]: tokens of the first so many
        padding = longest * torch.arange(1, len(rest) + 1) - sums
        size = max(1, int((padding <= PADDING * sums).sum()))
        chosen = rest[:size]
        rows.append((cu[chosen, None] + torch.arange(longest)).clamp_(max=tokens - 1).flatten())
        first_places[chosen] = place + longest * torch.arange(size)
        shapes.append((size, longest))
        begin, place = begin + size, place + size * longest
    device = cu_seqlens.device
    return Groups(shapes, torch.cat(rows).to(device), ranges(first_places, lengths).to(device))


def attend_in_groups(
    query, key, value, groups: Groups, scale: float, window: int | None, softcap=None, sinks=None
) -> Tensor:
    """query [tokens, heads, d] -> [tokens, heads, d], one batched call per group."""
    sizes = [sequences * longest for sequences, longest in groups.shapes]
    placed = (select(x, groups.rows).split(sizes) for x in (query, key, value))
    by_scores = softcap is not None or sinks is not None
    enable_gqa = query.shape[1] != key.shape[1]
    outs = []
    for shape, *parts in zip(groups.shapes, *placed, strict=True):
        mask, longest = None, shape[1]
        if by_scores or window and window < longest:
            mask = make_mask(longest, longest, window, query.device)
        padded = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in parts)
        if by_scores:
            out = attend_by_scores(*padded, mask, scale, softcap, sinks)
        else:
            out = scaled_dot_product_attention(
                *padded, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
            )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # of [sequences, heads, longest, d]
    return torch.cat(outs).index_select(0, groups.places)


def make_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys], the last query at the last key: which of the past it sees."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu(keys - queries + 1 - window) if window else mask


def attend_by_scores(
    query, key, value, mask: Tensor, scale: float, softcap: float | None = None, sinks=None
) -> Tensor:
    """query [batch, heads, tokens, d] -> [batch, heads, tokens, d], with all scores in memory."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale  # [batch, heads, tokens, past]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Not -inf: a row of padding sees nothing, and NaN would spread from it.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., : key.shape[2]].to(value.dtype) @ value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
