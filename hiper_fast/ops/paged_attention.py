"""Causal attention to keys and values that lie in blocks of a pool (Kwon et al., arXiv 2309.06180), for sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import FLOATS, HALVES, check_cu, check_vector
from hiper_fast.ops._numbers import check_above, check_count, check_finite

_INT = (torch.int32,)


def _check(query, keys, values, blocks, cu_query, lengths, scale, window, softcap, sinks):
    _check_shape("query", query, "[tokens, heads, d]", 3)
    _check_shape("keys", keys, "[pool, block, kv_heads, d]", 4)
    _check_shape("values", values, "[pool, block, kv_heads, d_v]", 4)
    _check_states(query, keys, values)
    device = query.device
    sequences = check_cu("cu_query", cu_query, device)
    check_vector("lengths", lengths, sequences, _INT, device)
    _check_shape("blocks", blocks, "[sequences, most]", 2)
    if blocks.shape[0] != sequences or blocks.dtype != torch.int32 or blocks.device != device:
        raise ValueError(
            f"blocks must be int32 of shape [{sequences}, most] on {device}, got {blocks.dtype} "
            f"{list(blocks.shape)} on {blocks.device}"
        )
    if scale is not None:
        check_finite("scale", scale)
    if window is not None:
        check_count("window", window)
        check_above("window", window, 0)
    if softcap is not None:
        check_above("softcap", softcap, 0)
    if sinks is not None:
        check_vector("sinks", sinks, query.shape[1], FLOATS, device)


def _check_shape(name, tensor, wanted, dimensions):
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")


def _check_states(query, keys, values):
    """That the three go together, and that a pool can be read where it lies."""
    (_, heads, d), (pool, block, kv_heads, key_d) = query.shape, keys.shape
    if query.dtype not in FLOATS:
        raise ValueError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    if query.is_cuda and query.dtype == torch.float64:
        raise ValueError("query must be float32, bfloat16 or float16 on a GPU, got torch.float64")
    if d == 0 or key_d != d:
        raise ValueError(f"keys must have the d of query, at least 1: got {key_d} and {d}")
    if block == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"keys must have blocks of at least one token and a number of kv_heads that divides query's "
            f"{heads} heads, got {list(keys.shape)}"
        )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values must have shape [{pool}, {block}, {kv_heads}, d_v] to go with keys, got {list(values.shape)}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous: a copy of the pool for each call is not made"
            )


def _run_reference(query, keys, values, blocks, cu_query, lengths, scale, window, softcap, sinks):
    _check_data(query, keys, blocks, cu_query, lengths)
    return reference.paged_attention(
        query, keys, values, blocks, cu_query, lengths,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip


def _check_data(query, keys, blocks, cu_query, lengths):
    """What the C++ kernel checks too."""
    _library.check_prefix_sum("cu_query", cu_query, query.shape[0])
    pool, block, most = keys.shape[0], keys.shape[1], blocks.shape[1]
    queries = cu_query.diff().tolist()
    for sequence, (length, own) in enumerate(zip(lengths.tolist(), queries, strict=True)):
        if not own <= length <= most * block:
            raise ValueError(
                f"lengths must lie between a sequence's queries and what its blocks hold, {own} and "
                f"{most * block} at index {sequence}, got {length}"
            )
        used = blocks[sequence, : -(-length // block)] if own else blocks[sequence, :0]
        for number in used.tolist():
            if not 0 <= number < pool:
                raise ValueError(
                    f"blocks must lie in [0, {pool}), got {number} at index {sequence}"
                )


def _run_cpp(query, keys, values, blocks, cu_query, lengths, scale, window, softcap, sinks):
    if query.dtype == torch.float64:
        with torch.no_grad():
            return _run_reference(
                query, keys, values, blocks, cu_query, lengths, scale, window, softcap, sinks
            )
    half = query.dtype in HALVES  # the pool is widened as it is read, a tile at a time
    out = _library.extension.paged_attention(
        torch.get_num_threads(), query.float().contiguous() if half else query.contiguous(), keys, values,
        blocks.contiguous(), cu_query.contiguous(), lengths.contiguous(), scale, window, softcap,
        None if sinks is None else sinks.float().contiguous(),
    )  # fmt: skip
    return out.to(query.dtype) if half else out


_op = _library.define(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor blocks, Tensor cu_query, Tensor lengths, "
    "float? scale, int? window, float? softcap, Tensor? sinks) -> Tensor",
    check=_check,
    cpp=_run_cpp,
    plain=_run_reference,
    cuda=True,
    fake=lambda query, keys, values, *_: query.new_empty((*query.shape[:2], values.shape[3])),
)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    cu_query: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale query . keys) values for each sequence's last tokens, over the past that a pool holds.

    Prompts being read (many queries) and sequences being decoded (one) go in one call. Query r of
    sequence i, which has n of them, stands at position p = lengths[i] - n + r and sees the positions
    in (p - window, p]; position t lies at keys[blocks[i, t // block], t % block]. A score s becomes
    softcap * tanh(s / softcap); a sink is one more score of its head, which takes its share of the
    softmax and gives nothing.

    Args:
        query: [tokens, heads, d] float32, bfloat16, float16 or, on a CPU, float64 (which runs the reference);
            of each sequence its last tokens, in order.
        keys: [pool, block, kv_heads, d] of query's dtype, contiguous; the queries of heads / kv_heads heads
            in a row share one of them.
        values: [pool, block, kv_heads, d_v], likewise.
        blocks: int32 [sequences, most]: the blocks that hold a sequence, in order. Behind its last one
            anything may stand, and of a sequence without queries none is read.
        cu_query: int32 [sequences + 1], exclusive prefix sum of each sequence's queries.
        lengths: int32 [sequences], tokens of the sequence in the pool, its queries' own among them.
        scale: of the scores, finite; None means d ** -0.5.
        window: how many positions are seen, a query's own among them; None means all.
        softcap: the scores' bound, above 0 and finite, or None.
        sinks: [heads] floating, or None.

    Returns:
        [tokens, heads, d_v] of query's dtype, summed in float32, detached from autograd.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    return _op(query, keys, values, blocks, cu_query, lengths, scale, window, softcap, sinks)
