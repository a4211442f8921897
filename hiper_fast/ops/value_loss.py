"""The clipped value loss of the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._autograd import find_needs, make_differentiable
from hiper_fast.ops._library import FLOATS, check_vector, make_plain
from hiper_fast.ops._numbers import check_not_negative

METRICS = ("value", "clip_fraction")


def _check(values, old_values, returns, mask, clip, *_):
    check_vector("values", values, None, FLOATS, None)
    turns, device, dtype = values.shape[0], values.device, (values.dtype,)
    check_vector("old_values", old_values, turns, dtype, device)
    check_vector("returns", returns, turns, dtype, device)
    check_vector("mask", mask, turns, (torch.bool,), device)
    check_not_negative("clip", clip)


def _run_torch(values, old_values, returns, mask, clip, denominator, want_gradient):
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    values, old_values, returns = (
        torch.where(mask, make_plain(tensor), 0.0) for tensor in (values, old_values, returns)
    )
    near = values.clamp(old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = torch.maximum(plain, clipped).sum() / denominator
    worse = clipped > plain  # there the clipped value counts, and that does not move
    metrics = torch.stack([loss, worse.sum() / denominator])
    gradient = torch.where(worse, 0.0, 2 * (values - returns)) / denominator
    return loss, metrics, gradient if want_gradient else gradient[:0].clone()


def _fake(values, old_values, returns, mask, clip, denominator, want_gradient):
    dtype = _library.widen(values.dtype)
    shapes = ((), len(METRICS), values.shape[0] if want_gradient else 0)
    return tuple(values.new_empty(shape, dtype=dtype) for shape in shapes)


_op = _library.define(
    "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float clip, float? denominator, "
    "bool want_gradient) -> (Tensor, Tensor, Tensor)",
    check=_check,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)
_call = make_differentiable("value_loss", _op, places=(0,), tensors=4)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.5,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the mask of max((v - ret)^2, (clip(v, old ± clip) - ret)^2), divided by `denominator`.

    Args:
        values, old_values, returns: [turns] float32, float64, bfloat16 or float16, all of one dtype.
        mask: bool [turns]; off it, values are ignored, NaN included.
        clip: at least 0 and finite.
        denominator: None divides by the number of masked turns; else as in `ppo_loss`.

    Returns:
        loss: 0-d, float32 or (for float64) float64, differentiable once in values.
        metrics: detached 0-d tensors over the same denominator: value (the loss), clip_fraction.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    fixed, divisor = _library.split_denominator(denominator)
    (needed,) = find_needs("value_loss", values)
    run = _call if needed else _op
    loss, metrics, *_ = run(values, old_values, returns, mask, clip, fixed, needed)
    loss, metrics = _library.divide(divisor, loss, metrics)
    return loss, dict(zip(METRICS, metrics.unbind(0), strict=True))
