"""The policy loss straight from hidden states, over loss rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops.linear_logprobs import linear_logprobs
from hiper_fast.ops.ppo_loss import ppo_loss


def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
    entropy_coef: float = 0.001,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss(linear_logprobs(hidden, weight, targets), …)` where every row carries loss.

    Args:
        hidden: [n, h] and weight: [v, h], targets: int64 [n], temperature, bias: as in `linear_logprobs`.
        old_logprobs, advantages, ref_logprobs: [n] float32, or float64 for float64 inputs.
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator: as in `ppo_loss`.

    Returns:
        loss: 0-d, differentiable in hidden, weight and bias; the weight's gradient is summed in float32.
        metrics: those of `ppo_loss`; entropy only where entropy_coef is not 0.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    result = linear_logprobs(hidden, weight, targets, temperature=temperature, bias=bias, entropy=entropy_coef != 0)
    logprobs, entropy = result if entropy_coef != 0 else (result, None)
    return ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        torch.ones_like(targets, dtype=torch.bool),
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        denominator=denominator,
    )
