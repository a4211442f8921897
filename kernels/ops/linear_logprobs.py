"""Log-probabilities and entropies straight from hidden states; see _head.py."""

import torch
from torch import Tensor

from hiper_fast.kernels._launch import wide
from hiper_fast.kernels._tiles import make_head


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    head = make_head(hidden, weight, bias, targets, temperature, softcap)
    logprobs = head.peaks.new_empty(len(targets))
    entropy = head.peaks.new_empty(len(targets) if want_entropy else 0)
    for part in head.chunks():
        head.statistics(part, logprobs, entropy if want_entropy else None)
    return logprobs.to(wide(hidden.dtype)), entropy.to(wide(hidden.dtype))


@torch.no_grad()
def linear_logprobs_backward(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    temperature: float, softcap: float | None, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_entropy [n], or [0] where the entropy was not used; then rows of gradient 0 are left out."""
    through_entropy = len(grad_entropy) > 0
    needs = (need_hidden, need_weight, need_bias)
    compact = not through_entropy
    head = make_head(hidden, weight, bias, targets, temperature, softcap, needs, compact=compact)
    logprobs = head.peaks.new_empty(len(targets))
    entropy = head.peaks.new_empty(len(targets)) if through_entropy else None
    grad_logprobs = grad_logprobs.contiguous()
    grad_entropy = grad_entropy.contiguous() if through_entropy else None
    for part in head.chunks():
        head.statistics(part, logprobs, entropy)
        head.gradient(part, entropy, grad_logprobs, grad_entropy)
    return head.gradients()
