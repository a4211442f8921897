"""The clipped value loss with its gradient in two launches: the terms of blocks of turns, then their totals.

max((v - ret)^2, (clip(v, old ± clip) - ret)^2);   its gradient is 2 (v - ret), or 0 where the clipped one is larger
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._total import BLOCK, finish, part_sums, store_part


@triton.jit(do_not_specialize=["turns"])
def _kernel(
    values, old_values, returns, mask, parts, gradient, turns, clip: tl.float64, scale: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t = program * BLOCK + tl.arange(0, BLOCK)
    counted = tl.load(mask + t, mask=t < turns, other=0) != 0
    dtype: tl.constexpr = values.dtype.element_ty
    value = tl.load(values + t, mask=counted, other=0.0)
    old = tl.load(old_values + t, mask=counted, other=0.0)
    target = tl.load(returns + t, mask=counted, other=0.0)
    reach = tl.full([], clip, dtype)
    near = tl.where(
        value < old - reach, old - reach, tl.where(value > old + reach, old + reach, value)
    )
    plain, clipped = (value - target) * (value - target), (near - target) * (near - target)
    worse = clipped > plain
    loss = tl.where(worse, clipped, plain)
    store_part(parts, program, 0, loss)
    store_part(parts, program, 1, loss)
    store_part(parts, program, 2, tl.where(worse, 1.0, 0.0))
    store_part(parts, program, 7, tl.where(counted, 1.0, 0.0))
    slope = tl.where(worse, 0.0, 2 * (value - target)) * tl.full([], scale, dtype)
    tl.store(gradient + t, slope, mask=t < turns)


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
                clip, 1.0 if denominator is None else 1.0 / denominator, BLOCK=BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
    gradient = gradient if want_gradient else values.new_empty(0)
    return *finish(parts, 2, values.dtype, denominator, [gradient]), gradient
