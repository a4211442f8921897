"""The clipped value loss with its gradient in two launches: the terms of blocks of turns, then their totals.

max((v - ret)^2, (clip(v, old ± clip) - ret)^2);   its gradient is 2 (v - ret), or 0 where the clipped one is larger
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._total import BLOCK, finish, part_sums, store_part
from hiper_fast.kernels._tuning import constants
from hiper_fast.kernels._vectors import are_aligned, read, write


@triton.jit(
    do_not_specialize=["turns", "aligned"],
    do_not_specialize_on_alignment=["values", "old_values", "returns", "mask"],
)
def _kernel(
    values, old_values, returns, mask, parts, gradient, turns, aligned, clip: tl.float64, scale: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t = program * BLOCK + tl.arange(0, BLOCK)
    whole = (aligned != 0) & ((program + 1) * BLOCK <= turns)
    counted = read(mask, t, turns, whole) != 0
    dtype: tl.constexpr = values.dtype.element_ty
    value = tl.where(counted, read(values, t, turns, whole), 0.0)
    old = tl.where(counted, read(old_values, t, turns, whole), 0.0)
    target = tl.where(counted, read(returns, t, turns, whole), 0.0)
    reach = tl.full([], clip, dtype)
    near = tl.where(
        value < old - reach, old - reach, tl.where(value > old + reach, old + reach, value)
    )
    plain, clipped = (value - target) * (value - target), (near - target) * (near - target)
    worse = clipped > plain
    loss = tl.where(worse, clipped, plain)
    one, nothing = tl.full([], 1.0, dtype), tl.zeros([BLOCK], dtype)
    store_part(
        parts, program, loss, loss, tl.where(worse, one, 0.0), nothing, nothing, nothing, nothing,
        tl.where(counted, one, 0.0),
    )  # fmt: skip
    slope = tl.where(worse, 0.0, 2 * (value - target)) * tl.full([], scale, dtype)
    write(gradient, t, slope, turns, whole)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float | None,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    values, old_values, returns, mask = (
        buffer(values),
        buffer(old_values),
        buffer(returns),
        mask.contiguous(),
    )
    turns = values.shape[0]
    parts, gradient = part_sums(values, turns), torch.empty_like(values)
    if turns:
        with on_device(values):
            _kernel[(triton.cdiv(turns, BLOCK),)](
                values, old_values, returns, mask, parts, gradient, turns,
                are_aligned(values, old_values, returns, mask),
                clip, 1.0 if denominator is None else 1.0 / denominator, BLOCK=BLOCK,
                **constants("value_loss._kernel", values.device, num_warps=4), enable_fp_fusion=True,
            )  # fmt: skip
    gradient = gradient if want_gradient else values.new_empty(0)
    return *finish(parts, 2, values.dtype, denominator, [gradient]), gradient
