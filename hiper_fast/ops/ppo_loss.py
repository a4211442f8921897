"""The clipped policy loss (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729), KL and entropy terms."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops._library import FLOATS, check_vector


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
    entropy_coef: float = 0.001,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the masked tokens, divided by `denominator`, of pg + kl_coef kl - entropy_coef entropy.

        r  = exp(logprobs - old_logprobs)
        pg = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and for A < 0 at most -A dual_clip
        kl = clamp(exp(d) - d - 1, -10, 10),  d = ref_logprobs - logprobs

    Args:
        logprobs, old_logprobs, advantages: [tokens] float32 or float64.
        loss_mask: bool [tokens]; off it, values are ignored, NaN included.
        ref_logprobs, entropy: [tokens] or None, which leaves the term out.
        denominator: None divides by the number of masked tokens. Microbatches of one step share a
            denominator, so that their losses (and metrics) add up.

    Returns:
        loss: 0-d, differentiable in logprobs and entropy.
        metrics: detached 0-d tensors over the same denominator: policy, approx_kl (old_logprobs - logprobs),
            clip_fraction, dual_clip_fraction, and kl, entropy where these terms exist.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_vector("logprobs", logprobs, None, FLOATS, None)
    tokens, device, dtype = logprobs.shape[0], logprobs.device, (logprobs.dtype,)
    check_vector("old_logprobs", old_logprobs, tokens, dtype, device)
    check_vector("advantages", advantages, tokens, dtype, device)
    check_vector("loss_mask", loss_mask, tokens, (torch.bool,), device)
    if ref_logprobs is not None:
        check_vector("ref_logprobs", ref_logprobs, tokens, dtype, device)
    if entropy is not None:
        check_vector("entropy", entropy, tokens, dtype, device)
    if denominator is None:
        denominator = loss_mask.sum().clamp(min=1)

    def masked(x: Tensor) -> Tensor:
        return torch.where(loss_mask, x, 0.0)

    def mean(x: Tensor) -> Tensor:
        return x.sum() / denominator

    # Beyond exp(20) every branch is clipped; the bound keeps infinities out of the gradient.
    log_ratio = masked(logprobs - old_logprobs)
    ratio = log_ratio.clamp(max=20).exp()
    gain = masked(advantages)
    plain = -gain * ratio
    clipped = -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    bound = torch.where(gain < 0, -gain * dual_clip, torch.inf)
    single = torch.maximum(plain, clipped)
    loss = policy = mean(torch.minimum(single, bound))
    metrics = {
        "policy": policy,
        "approx_kl": mean(-log_ratio),
        "clip_fraction": mean((clipped > plain).to(plain.dtype)),
        "dual_clip_fraction": mean((single > bound).to(plain.dtype)),
    }
    if ref_logprobs is not None:
        d = masked(ref_logprobs - logprobs).clamp(max=20)
        metrics["kl"] = mean((d.exp() - d - 1).clamp(-10, 10))
        loss = loss + kl_coef * metrics["kl"]
    if entropy is not None:
        metrics["entropy"] = mean(masked(entropy))
        loss = loss - entropy_coef * metrics["entropy"]
    return loss, {name: value.detach() for name, value in metrics.items()}
