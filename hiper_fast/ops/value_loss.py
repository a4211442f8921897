"""The clipped value loss of the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops._library import FLOATS, check_vector


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
        values, old_values, returns: [turns] float32 or float64.
        mask: bool [turns]; off it, values are ignored, NaN included.
        denominator: None divides by the number of masked turns; else as in `ppo_loss`.

    Returns:
        loss: 0-d, differentiable in values.
        metrics: detached 0-d tensors over the same denominator: value (the loss), clip_fraction.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_vector("values", values, None, FLOATS, None)
    turns, device, dtype = values.shape[0], values.device, (values.dtype,)
    check_vector("old_values", old_values, turns, dtype, device)
    check_vector("returns", returns, turns, dtype, device)
    check_vector("mask", mask, turns, (torch.bool,), device)
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns).square()
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = torch.maximum(plain, clipped).sum() / denominator
    metrics = {"value": loss.detach(), "clip_fraction": (clipped > plain).sum() / denominator}
    return loss, metrics
