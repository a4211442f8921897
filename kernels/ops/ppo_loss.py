"""The policy loss with its gradients in two launches: the terms of blocks of tokens, then their totals."""

import torch
from torch import Tensor

from hiper_fast.kernels import _policy
from hiper_fast.kernels._launch import buffer
from hiper_fast.kernels._total import finish, part_sums


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, ref_logprobs: Tensor | None,
    entropy: Tensor | None, clip_low: float, clip_high: float, dual_clip: float, kl_coef: float, entropy_coef: float,
    denominator: float | None, want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    floats = (logprobs, old_logprobs, advantages, ref_logprobs, entropy)
    logprobs, old_logprobs, advantages, ref_logprobs, entropy = map(buffer, floats)
    parts = part_sums(logprobs, logprobs.shape[0])
    gradient = torch.empty_like(logprobs)
    gradient_entropy = None if entropy is None else torch.empty_like(entropy)
    _policy.terms(
        parts, gradient, gradient_entropy, 1.0 if denominator is None else 1.0 / denominator,
        logprobs, old_logprobs, advantages, loss_mask.contiguous(), ref_logprobs, entropy,
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef,
    )  # fmt: skip
    wanted = (gradient, gradient_entropy) if want_gradient else (None, None)
    gradients = [logprobs.new_empty(0) if x is None else x for x in wanted]
    return *finish(parts, _policy.METRICS, logprobs.dtype, denominator, gradients), *gradients
