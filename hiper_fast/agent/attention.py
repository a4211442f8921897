"""Causal attention over packed sequences, for models that use transformers' AttentionInterface.

A call that brings cu_seq_lens_q is packed: flash-attn's varlen function if installed, else
torch's, both for half precision on CUDA; elsewhere scaled_dot_product_attention over sequences of
like length. Other calls, such as a decoding step with its cache and mask, are transformers' own
sdpa.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hiper_fast.options import ConfigError
from hiper_fast.packing import Microbatch, ranges

NAME = "hiper_fast_packed"
LAYERS = {"full_attention", "sliding_attention"}
UNPACKABLE = "softcap", "s_aux", "position_bias"
PADDING = (
    0.1  # of a group's tokens, where scaled_dot_product_attention needs sequences of one length
)
HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256  # of the varlen functions


def use(model: PreTrainedModel) -> None:
    """Makes `model` attend by this module; ConfigError if its token mixing cannot be packed."""
    other = set(getattr(model.config, "layer_types", None) or ()) - LAYERS
    if not other and not getattr(model, "_is_stateful", False):
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        what = "token mixing other than plain attention"
        if other:
            what = f"layers of type {', '.join(sorted(other))}"
        raise ConfigError(
            f"model.path: {type(model).__name__} has {what}, which cannot read packed sequences; "
            "use a model of full or sliding causal attention, such as Qwen2.5, Qwen3 or Llama"
        )


def describe_packing(batch: Microbatch, dtype: torch.dtype) -> dict:
    """What a forward gets beside ids and positions, so that its attention keeps sequences apart."""
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    return {
        "attention_mask": cu_seqlens.new_empty(1, 1, 0, 0),  # of four dimensions: no mask is made
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "groups": None if cu_seqlens.is_cuda and dtype in HALF else group_lengths(cu_seqlens),
    }


def attend(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, groups=None, **options,
):  # fmt: skip
    """The function registered with transformers -> ([1, tokens, heads, d], None).

    query [1, heads, tokens, d]; key and value of as many heads or fewer.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    check_plain(module, dropout, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, d]
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    kernel = find_varlen_kernel() if query.is_cuda and query.dtype in HALF else None
    if kernel and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD:
        out = kernel(query, key, value, cu_seq_lens_q, max_length_q, scale, window)
    else:
        groups = group_lengths(cu_seq_lens_q) if groups is None else groups
        out = attend_in_groups(query, key, value, groups, scale, window)
    return out[None], None


def check_plain(module, dropout: float, options: dict) -> None:
    """ConfigError for a packed call whose attention is not plain softmax over the past."""
    odd = [name for name in UNPACKABLE if options.get(name) is not None]
    odd += ["attention_dropout"] if dropout else []
    odd += ["attention in both directions"] if not getattr(module, "is_causal", True) else []
    if odd:
        raise ConfigError(
            f"model.path: packed attention cannot do this model's {', '.join(odd)}; "
            "use another model"
        )


@functools.cache
def find_varlen_kernel():
    """(query, key, value, cu_seqlens, longest, scale, window) -> [tokens, heads, d]; or None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return find_torch_varlen_kernel()

    def flash(query, key, value, cu, longest, scale, window):
        reach = (window - 1, 0) if window else (-1, -1)
        return flash_attn_varlen_func(
            query, key, value, cu, cu, longest, longest,
            softmax_scale=scale, causal=True, window_size=reach,
        )  # fmt: skip

    return flash


def find_torch_varlen_kernel():
    """torch's varlen_attn; None in torch 2.10, where it takes neither scale nor window."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known:
        return None
    options = {"enable_gqa": True} if "enable_gqa" in known else {}

    def varlen(query, key, value, cu, longest, scale, window):
        if not options:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        reach = (window - 1 if window else -1, 0)
        return varlen_attn(
            query, key, value, cu, cu, longest, longest, scale=scale, window_size=reach, **options
        )

    return varlen


@dataclass(slots=True)
class Groups:
    """How packed sequences become right-padded batches, each of like lengths, and come back.

    The padding of a sequence is whatever follows it: under a causal mask none of its tokens sees
    that.
    """

    shapes: list[tuple[int, int]]  # (sequences, longest) of each batch
    rows: Tensor  # int64 [places of all batches]: the packed row that stands there
    places: Tensor  # int64 [tokens]: where each packed row stands


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


def attend_in_groups(query, key, value, groups: Groups, scale: float, window: int | None) -> Tensor:
    """query [tokens, heads, d] -> [tokens, heads, d], one batched call per group."""
    sizes = [sequences * longest for sequences, longest in groups.shapes]
    placed = (x.index_select(0, groups.rows).split(sizes) for x in (query, key, value))
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    outs = []
    for shape, *parts in zip(groups.shapes, *placed, strict=True):
        mask, longest = None, shape[1]
        if window and window < longest:
            mask = torch.ones(longest, longest, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - window)
        padded = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in parts)
        out = scaled_dot_product_attention(
            *padded, attn_mask=mask, is_causal=mask is None, **options
        )  # [sequences, heads, longest, d]
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, groups.places)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
