"""The clipped policy loss (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729), KL, entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._autograd import find_needs, make_differentiable
from hiper_fast.ops._library import FLOATS, check_vector
from hiper_fast.ops._ppo import METRICS, check_options, name_metrics, ppo_terms


def _check(logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy, *options):
    check_vector("logprobs", logprobs, None, FLOATS, None)
    tokens, device, dtype = logprobs.shape[0], logprobs.device, (logprobs.dtype,)
    check_vector("old_logprobs", old_logprobs, tokens, dtype, device)
    check_vector("advantages", advantages, tokens, dtype, device)
    check_vector("loss_mask", loss_mask, tokens, (torch.bool,), device)
    if ref_logprobs is not None:
        check_vector("ref_logprobs", ref_logprobs, tokens, dtype, device)
    if entropy is not None:
        check_vector("entropy", entropy, tokens, dtype, device)
    check_options(*options[:5])


def _fake(logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy, *options):
    dtype, tokens = _library.widen(logprobs.dtype), logprobs.shape[0] if options[-1] else 0
    shapes = ((), len(METRICS), tokens, 0 if entropy is None else tokens)
    return tuple(logprobs.new_empty(shape, dtype=dtype) for shape in shapes)


_op = _library.define(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor loss_mask, Tensor? ref_logprobs, "
    "Tensor? entropy, float clip_low, float clip_high, float dual_clip, float kl_coef, float entropy_coef, "
    "float? denominator, bool want_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    plain=ppo_terms,
    cuda=True,
    fake=_fake,
)
_call = make_differentiable("ppo_loss", _op, places=(0, 5), tensors=6)


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
        logprobs, old_logprobs, advantages: [tokens] float32, float64, bfloat16 or float16, all of one
            dtype.
        loss_mask: bool [tokens]; off it, values are ignored, NaN included.
        ref_logprobs, entropy: [tokens] or None, which leaves the term out.
        clip_low: in [0, 1]; clip_high: at least 0; dual_clip: above 1; kl_coef, entropy_coef: finite.
        denominator: None divides by the number of masked tokens. Microbatches of one step share a
            denominator, so that their losses (and metrics) add up. A number above 0, or a tensor without
            dimensions, which is read on the CPU alone; on a GPU the loss is NaN where it is not above 0.

    Returns:
        loss: 0-d, float32 or (for float64) float64, differentiable once in logprobs and entropy.
        metrics: detached 0-d tensors over the same denominator: policy, approx_kl (old_logprobs -
            logprobs), clip_fraction, dual_clip_fraction, and kl, entropy where these terms exist.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    fixed, divisor = _library.split_denominator(denominator)
    needed = any(find_needs("ppo_loss", logprobs, entropy))
    run = _call if needed else _op
    loss, metrics, *_ = run(
        logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy,
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef, fixed, needed,
    )  # fmt: skip
    loss, metrics = _library.divide(divisor, loss, metrics)
    return loss, name_metrics(metrics, kl=ref_logprobs is not None, entropy=entropy is not None)
