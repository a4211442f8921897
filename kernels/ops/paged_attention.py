"""Attention to keys and values in blocks of a pool: one launch, and a second where the keys were split.

A program holds QUERIES queries of one sequence in the SHARED heads that share one of keys, a row each, and goes through
the keys that they see with an online softmax. There are as many programs as the shapes allow for, so that nothing need
be known of cu_query on the host: sequence i begins at program cu_query[i] // QUERIES + i, and some find nothing to do.
Where the programs are too few for the GPU, each tile's keys are split among SPLITS of them (flash-decoding); these
write sums, tops and totals, which the second kernel merges.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._head import tanh
from hiper_fast.kernels._launch import count_processors, on_device
from hiper_fast.kernels._scan import bounds
from hiper_fast.kernels._tuning import constants

_LOWEST = tl.constexpr(-1e30)  # stands for minus infinity, so that none is subtracted from another
_LEAST_KEYS, _MOST_SPLITS = 256, 32  # for a split to be worth its merging
_PROCESSORS = 132  # of a GPU that is not here


@triton.jit
def _find_sequence(cu_query, sequences, program, QUERIES: tl.constexpr):
    """The last sequence that begins at this program or before it."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(cu_query + middle) // QUERIES + middle
        low = tl.where(begins <= program, middle, low)
        high = tl.where(begins <= program, high, middle)
    return low


@triton.jit
def _places(blocks, t, inside, pool, flags, BLOCK: tl.constexpr, SLOT: tl.constexpr):
    """Where in the pool the positions t of a sequence lie."""
    number = tl.load(blocks + t // BLOCK, mask=inside, other=0)
    tl.store(flags + SLOT + tl.zeros_like(t), 1, mask=inside & ((number < 0) | (number >= pool)))
    number = tl.minimum(tl.maximum(number, 0), pool - 1)
    return number.to(tl.int64) * BLOCK + t % BLOCK


@triton.jit(do_not_specialize=["tokens", "sequences", "most", "pool", "window"])
def _kernel(
    query, keys, values, blocks, cu_query, lengths, sinks, out, tops, totals, flags,
    tokens, sequences, most, pool, window, scale: tl.float32, softcap: tl.float32,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    WIDE: tl.constexpr, WIDE_V: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr, CAPPED: tl.constexpr,
    CU_SLOT: tl.constexpr, LENGTHS_SLOT: tl.constexpr, BLOCKS_SLOT: tl.constexpr,
):  # fmt: skip
    program, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    bounds(cu_query, program, sequences, tokens, flags, CU_SLOT)  # there is a program for each
    sequence = _find_sequence(cu_query, sequences, program, QUERIES)
    begin, end = bounds(cu_query, sequence, sequences, tokens, flags, CU_SLOT)
    first = (program - begin // QUERIES - sequence) * QUERIES
    own = end - begin
    if first >= own:
        return
    length = tl.load(lengths + sequence)
    if (length < own) | (length > most * BLOCK):
        tl.store(flags + LENGTHS_SLOT, 1)
    length = tl.minimum(tl.maximum(length, own), most * BLOCK)

    row = tl.arange(0, ROWS)
    r = first + row // SHARED
    head = kv_head * SHARED + row % SHARED
    real = (row < QUERIES * SHARED) & (r < own)
    position = length - own + r  # [ROWS]
    place = (begin + r).to(tl.int64) * HEADS + head
    d, d_v = tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    rows = tl.load(query + place[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0)

    top = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        if split == 0:
            sink = tl.load(sinks + head, mask=real, other=_LOWEST).to(tl.float32)
            top = tl.maximum(sink, _LOWEST)
            total = tl.where(sink > _LOWEST, 1.0, 0.0)
    sums = tl.zeros([ROWS, WIDE_V], tl.float32)
    last = tl.minimum(length, length - own + first + QUERIES)  # keys from here on are seen by none
    start = tl.maximum(length - own + first - window + 1, 0)
    step = tl.cdiv(tl.cdiv(last - start, KEYS), SPLITS) * KEYS
    for tile in range(start + split * step, tl.minimum(last, start + (split + 1) * step), KEYS):
        t = tile + tl.arange(0, KEYS)
        inside = t < last
        slot = _places(
            blocks + sequence.to(tl.int64) * most, t, inside, pool, flags, BLOCK, BLOCKS_SLOT
        )
        slot = slot * (HEADS // SHARED) + kv_head
        key = tl.load(
            keys + slot[None, :] * D + d[:, None],
            mask=inside[None, :] & (d[:, None] < D),
            other=0.0,
        )  # [WIDE, KEYS]
        score = tl.dot(rows, key, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * tanh(score / softcap)
        seen = (t[None, :] <= position[:, None]) & (t[None, :] > position[:, None] - window)
        score = tl.where(seen, score, _LOWEST)
        highest = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.where(seen, tl.exp(score - highest[:, None]), 0.0)
        factor = tl.exp(top - highest)
        value = tl.load(
            values + slot[:, None] * D_V + d_v, mask=inside[:, None] & (d_v < D_V), other=0.0
        )  # [KEYS, WIDE_V]
        product = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        sums = sums * factor[:, None] + product
        total = total * factor + tl.sum(weight, axis=1)
        top = highest

    stored = real[:, None] & (d_v < D_V)
    if SPLITS == 1:
        result = sums / total[:, None]
        tl.store(out + place[:, None] * D_V + d_v, result.to(out.dtype.element_ty), mask=stored)
    else:
        place += split.to(tl.int64) * tokens * HEADS
        tl.store(out + place[:, None] * D_V + d_v, sums, mask=stored)
        tl.store(tops + place, top, mask=real)
        tl.store(totals + place, total, mask=real)


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    parts, tops, totals, out, rows,
    D_V: tl.constexpr, WIDE_V: tl.constexpr, SPLITS: tl.constexpr, WIDE_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split, d_v = tl.arange(0, WIDE_SPLITS), tl.arange(0, WIDE_V)
    place = split.to(tl.int64) * rows + row
    top = tl.load(tops + place, mask=split < SPLITS, other=_LOWEST)
    share = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(share * tl.load(totals + place, mask=split < SPLITS, other=0.0), axis=0)
    inside = (split[:, None] < SPLITS) & (d_v < D_V)
    part = tl.load(parts + place[:, None] * D_V + d_v, mask=inside, other=0.0)
    result = tl.sum(part * share[:, None], axis=0) / total
    tl.store(out + row * D_V + d_v, result.to(out.dtype.element_ty), mask=d_v < D_V)


def _tile(query: Tensor, sequences: int, shared: int, wide: int) -> dict[str, int]:
    """By the mean number of queries: more rows for prompts, where tensor cores multiply them and registers allow."""
    half = query.dtype != torch.float32
    prompts = half and wide <= 128 and len(query) * shared > 16 * sequences
    shape = {
        "ROWS": 64 if prompts else 16,
        "KEYS": 64 if half else 32 if wide < 128 else 16,
        "num_warps": 8 if prompts or half and wide > 128 else 4,
        "num_stages": 3,
    }
    if half and wide <= 128:  # as most models, and as what is measured
        case = "prompts" if prompts else "steps"
        shape = constants(f"paged_attention._kernel {case}", query.device, **shape)
    rows = max(shape["ROWS"], triton.next_power_of_2(shared))
    return shape | {"ROWS": rows, "QUERIES": rows // shared}


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, cu_query: Tensor, lengths: Tensor,
    scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    (tokens, heads, d), (pool, block, kv_heads, d_v) = query.shape, values.shape
    (sequences, most), shared = blocks.shape, heads // kv_heads
    out = query.new_empty(tokens, heads, d_v)
    if not out.numel():
        return out
    wide, wide_v = (max(16, triton.next_power_of_2(size)) for size in (d, d_v))
    shape = _tile(query, sequences, shared, max(wide, wide_v))
    programs = tokens // shape["QUERIES"] + sequences
    idle = triton.cdiv(2 * count_processors(query.device, _PROCESSORS), programs * kv_heads)
    least = constants("paged_attention.splits", query.device, LEAST_KEYS=_LEAST_KEYS)["LEAST_KEYS"]
    splits = max(1, min(idle, triton.cdiv(most * block, least), _MOST_SPLITS))
    parts, tops, totals = out, out, out
    if splits > 1:
        parts = query.new_empty(splits, tokens, heads, d_v, dtype=torch.float32)
        tops, totals = parts.new_empty(2, splits, tokens, heads).unbind(0)
    with on_device(query):
        _kernel[(programs, kv_heads, splits)](
            query.contiguous(), keys, values, blocks.contiguous(), cu_query.contiguous(), lengths.contiguous(),
            None if sinks is None else sinks.contiguous(), parts, tops, totals, _errors.flags(),
            tokens, sequences, most, pool, most * block if window is None else min(window, most * block),
            d**-0.5 if scale is None else scale, softcap or 0.0,
            BLOCK=block, HEADS=heads, SHARED=shared, D=d, D_V=d_v,
            WIDE=wide, WIDE_V=wide_v, **shape,
            SPLITS=splits, HAS_SINKS=sinks is not None, CAPPED=softcap is not None,
            CU_SLOT=_errors.ATTENTION_QUERIES, LENGTHS_SLOT=_errors.ATTENTION_LENGTHS,
            BLOCKS_SLOT=_errors.ATTENTION_BLOCKS, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(tokens * heads,)](
                parts, tops, totals, out, tokens * heads, D_V=d_v, WIDE_V=wide_v,
                SPLITS=splits, WIDE_SPLITS=triton.next_power_of_2(splits),
                **constants("paged_attention._merge_kernel", query.device, num_warps=4), enable_fp_fusion=True,
            )  # fmt: skip
    return out
