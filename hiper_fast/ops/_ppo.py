"""What ppo_loss and linear_ppo share: the loss and its gradients in plain torch, and its metrics' names."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops._library import make_plain
from hiper_fast.ops._numbers import check_above, check_finite, check_fraction, check_not_negative

MAX_EXPONENT = (
    20  # beyond it every branch is clipped; the bound keeps infinities out of the gradient
)
MAX_KL = 10
METRICS = ("policy", "approx_kl", "clip_fraction", "dual_clip_fraction", "kl", "entropy")


def check_options(clip_low, clip_high, dual_clip, kl_coef, entropy_coef) -> None:
    check_fraction("clip_low", clip_low)
    check_not_negative("clip_high", clip_high)
    check_above("dual_clip", dual_clip, 1)
    check_finite("kl_coef", kl_coef)
    check_finite("entropy_coef", entropy_coef)


def name_metrics(metrics: Tensor, *, kl: bool, entropy: bool) -> dict[str, Tensor]:
    """The row of METRICS as 0-d tensors, those of absent terms left out."""
    named = dict(zip(METRICS, metrics.unbind(0), strict=True))
    if not kl:
        del named["kl"]
    if not entropy:
        del named["entropy"]
    return named


def ppo_terms(
    logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator, want_gradient,
):  # fmt: skip
    """loss, metrics [METRICS], gradients of logprobs and entropy (empty where not wanted), each by its
    formula."""
    if denominator is None:
        denominator = loss_mask.sum().clamp(min=1)

    def masked(x: Tensor) -> Tensor:
        return torch.where(loss_mask, make_plain(x), 0.0)

    def mean(x: Tensor) -> Tensor:
        return x.sum() / denominator

    log_ratio = masked(logprobs) - masked(old_logprobs)
    ratio = log_ratio.clamp(max=MAX_EXPONENT).exp()
    gain = masked(advantages)
    plain = -gain * ratio
    clipped = -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    bound = torch.where(gain < 0, -gain * dual_clip, torch.inf)
    single = torch.maximum(plain, clipped)
    loss = policy = mean(torch.minimum(single, bound))
    gradient = torch.where(
        (clipped > plain) | (single > bound) | (log_ratio > MAX_EXPONENT), 0.0, plain
    )
    kl = mean_entropy = torch.zeros_like(policy)
    gradient_entropy = torch.zeros_like(gradient[:0])
    if ref_logprobs is not None:
        d = masked(ref_logprobs) - masked(logprobs)
        bounded = d.clamp(max=MAX_EXPONENT)
        k = bounded.exp() - bounded - 1
        kl = mean(k.clamp(-MAX_KL, MAX_KL))
        loss = loss + kl_coef * kl
        gradient = gradient + kl_coef * torch.where(
            (k > MAX_KL) | (d > MAX_EXPONENT), 0.0, 1 - bounded.exp()
        )
    if entropy is not None:
        mean_entropy = mean(masked(entropy))
        loss = loss - entropy_coef * mean_entropy
        gradient_entropy = -entropy_coef * loss_mask.to(gradient.dtype) / denominator
    metrics = torch.stack(
        [
            policy,
            mean(-log_ratio),
            (clipped > plain).sum() / denominator,
            (single > bound).sum() / denominator,
            kl,
            mean_entropy,
        ]
    ).to(loss.dtype)
    gradient = gradient / denominator
    if not want_gradient:
        gradient, gradient_entropy = torch.zeros_like(gradient[:0]), torch.zeros_like(gradient[:0])
    return loss, metrics, gradient, gradient_entropy
