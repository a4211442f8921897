"""The second half of a loss: sums of blocks -> loss and metrics over the denominator, always added in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._tuning import constants

_COLUMNS = tl.constexpr(8)  # of the sums: loss, metrics, and in the last the count
BLOCK = 1024  # tokens of a block


@triton.jit
def store_part(parts, program, a, b, c, d, e, f, g, h):
    """Writes a block's sums of the eight columns, all added at once."""
    pairs = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    columns = tl.join(pairs[0], pairs[1])  # [tokens, 2, 2, 2], in the columns' order
    sums = tl.reshape(tl.sum(columns, axis=0), [_COLUMNS])
    tl.store(parts + program * _COLUMNS + tl.arange(0, _COLUMNS), sums.to(tl.float64))


@triton.jit(do_not_specialize=["number", "metric_count"])
def _finish_kernel(
    parts, loss, metrics, divisor_out, number, metric_count, denominator: tl.float64,
    BY_COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, _COLUMNS)
    sums = tl.zeros([_COLUMNS], tl.float64)
    for start in range(0, number, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < number)[:, None]
        sums += tl.sum(
            tl.load(parts + row[:, None] * _COLUMNS + column[None, :], mask=inside, other=0.0),
            axis=0,
        )
    divisor = denominator
    if BY_COUNT:
        divisor = tl.maximum(tl.sum(tl.where(column == _COLUMNS - 1, sums, 0.0)), 1.0)
        tl.store(divisor_out, divisor)
    tl.store(loss + column, sums / divisor, mask=column == 0)
    tl.store(metrics + column - 1, sums / divisor, mask=(column >= 1) & (column <= metric_count))


def part_sums(like: Tensor, tokens: int) -> Tensor:
    """Room for the sums of the blocks of so many tokens."""
    return like.new_empty(triton.cdiv(tokens, BLOCK), _COLUMNS.value, dtype=torch.float64)


def finish(
    parts: Tensor,
    metric_count: int,
    dtype: torch.dtype,
    denominator: float | None,
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """(loss 0-d, metrics [metric_count]) of `dtype`: the sums over the denominator.

    None divides by the count, and the gradients, which then are those of the sums, in place too.
    """
    loss, metrics = parts.new_empty((), dtype=dtype), parts.new_empty(metric_count, dtype=dtype)
    by_count = denominator is None
    divisor = torch.empty_like(loss) if by_count else None
    with on_device(parts):
        _finish_kernel[(1,)](
            parts, loss, metrics, divisor, parts.shape[0], metric_count, 1.0 if by_count else denominator,
            BY_COUNT=by_count, **constants("_total._finish_kernel", parts.device, ROWS=128, num_warps=4),
            enable_fp_fusion=True,
        )  # fmt: skip
    if by_count:
        for gradient in gradients:
            gradient.div_(divisor)
    return loss, metrics
