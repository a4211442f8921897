"""(values - mean) / (std + eps) over a mask, in two launches: the moments of blocks, then their pool and the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._moments import MOST_PARTS, merge, moments, new_parts, pooled, store_part
from hiper_fast.kernels._tuning import constants
from hiper_fast.kernels._vectors import are_aligned, read, write


@triton.jit(
    do_not_specialize=["turns", "aligned", "steps"],
    do_not_specialize_on_alignment=["values", "mask"],
)
def _moments_kernel(values, mask, parts, turns, aligned, steps, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    nothing = tl.zeros([1], values.dtype.element_ty)
    count, mean, residual, squares = nothing, nothing, nothing, nothing
    for step in range(0, steps):
        start = (program * steps + step) * BLOCK
        t = start + tl.arange(0, BLOCK)
        whole = (aligned != 0) & (start + BLOCK <= turns)
        chosen = read(mask, t, turns, whole) != 0
        x = read(values, t, turns, whole)
        more_count, more_mean, more_residual, more_squares = moments(x[None, :], chosen[None, :])
        count, mean, residual, squares = merge(
            count, mean, residual, squares, more_count, more_mean, more_residual, more_squares
        )
    store_part(parts, program, count, mean, residual, squares, 1)


@triton.jit(
    do_not_specialize=["turns", "aligned", "number"],
    do_not_specialize_on_alignment=["values", "mask"],
)
def _normalize_kernel(
    values, mask, parts, out, turns, aligned, number, eps: tl.float64, BLOCK: tl.constexpr
):
    mean, rest, scale = pooled(parts, number, eps, 1)
    start = tl.program_id(0) * BLOCK
    t = start + tl.arange(0, BLOCK)
    whole = (aligned != 0) & (start + BLOCK <= turns)
    chosen = read(mask, t, turns, whole) != 0
    x = read(values, t, turns, whole)
    write(out, t, tl.where(chosen, (x - mean - rest) * scale, 0.0), turns, whole)


def normalize(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    values, mask, turns = buffer(values), mask.contiguous(), values.shape[0]
    out, parts = torch.empty_like(values), new_parts(values, 1)
    if turns:
        of_parts, of_values = (
            constants(f"normalize.{kernel}", values.device, BLOCK=1024, num_warps=4)
            for kernel in ("_moments_kernel", "_normalize_kernel")
        )
        steps = triton.cdiv(turns, of_parts["BLOCK"] * MOST_PARTS.value)
        number = triton.cdiv(turns, of_parts["BLOCK"] * steps)
        aligned = are_aligned(values, mask)
        with on_device(values):
            _moments_kernel[(number,)](
                values, mask, parts, turns, aligned, steps, **of_parts, enable_fp_fusion=True
            )
            _normalize_kernel[(triton.cdiv(turns, of_values["BLOCK"]),)](
                values, mask, parts, out, turns, aligned, number, eps, **of_values, enable_fp_fusion=True
            )  # fmt: skip
    return out
