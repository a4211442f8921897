"""(values - mean) / (std + eps) over a mask, in two launches: the moments of blocks, then their pool and the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._moments import MOST_PARTS, merge, moments, part_block, pooled, store_part

_BLOCK = 1024


@triton.jit(do_not_specialize=["turns", "steps"])
def _moments_kernel(values, mask, parts, turns, steps, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for step in range(0, steps):
        t = (program * steps + step) * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(mask + t, mask=t < turns, other=0) != 0
        x = tl.load(values + t, mask=chosen, other=0.0).to(tl.float64)
        more_count, more_mean, more_squares = moments(x, chosen)
        count, mean, squares = merge(count, mean, squares, more_count, more_mean, more_squares)
    store_part(parts, programs, program, count, mean, squares)


@triton.jit(do_not_specialize=["turns", "number"])
def _normalize_kernel(
    values,
    mask,
    parts,
    out,
    turns,
    number,
    eps: tl.float64,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mean, scale = pooled(parts, number, number, eps, PARTS)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(mask + t, mask=t < turns, other=0) != 0
    x = tl.load(values + t, mask=chosen, other=0.0).to(tl.float64)
    tl.store(out + t, tl.where(chosen, (x - mean) * scale, 0.0), mask=t < turns)


def normalize(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    values, mask, turns = buffer(values), mask.contiguous(), values.shape[0]
    out = torch.empty_like(values)
    if turns:
        steps = triton.cdiv(turns, _BLOCK * MOST_PARTS)
        number = triton.cdiv(turns, _BLOCK * steps)
        parts = values.new_empty(3, number, dtype=torch.float64)
        with on_device(values):
            _moments_kernel[(number,)](
                values, mask, parts, turns, steps, BLOCK=_BLOCK, enable_fp_fusion=True
            )
            _normalize_kernel[(triton.cdiv(turns, _BLOCK),)](
                values, mask, parts, out, turns, number, eps,
                PARTS=part_block(number), BLOCK=_BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
    return out
