"""The head and the policy loss in one: three products instead of the four of linear_logprobs and ppo_loss.

A row's gradient depends on its own log-prob and entropy and on known numbers, so it is made as soon as the row's logits
are there, and they are not made again in backward. See _head.py for the products, _policy.py for the loss.
"""

import torch
import triton
from torch import Tensor

from hiper_fast.kernels import _policy
from hiper_fast.kernels._launch import buffer, wide
from hiper_fast.kernels._tiles import make_head
from hiper_fast.kernels._total import BLOCK, finish, part_sums


@torch.no_grad()
def linear_ppo(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, old_logprobs: Tensor, advantages: Tensor,
    ref_logprobs: Tensor | None, temperature: float, softcap: float | None, clip_low: float, clip_high: float,
    dual_clip: float, kl_coef: float, entropy_coef: float, denominator: float | None,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, needs = len(targets), (need_hidden, need_weight, need_bias)
    denominator = float(rows or 1) if denominator is None else denominator
    # Only the ratio's term can have a gradient of exactly 0: by its clips, or for advantage 0.
    compact = entropy_coef == 0 and (ref_logprobs is None or kl_coef == 0)
    head = make_head(
        hidden, weight, bias, targets, temperature, softcap, needs, 1.0 / denominator, compact
    )
    logprobs = head.peaks.new_empty(rows)
    slope, entropy, entropy_slope = head.peaks.new_empty(3, rows).unbind(0)
    if entropy_coef == 0:
        entropy = entropy_slope = None
    every = torch.ones_like(targets, dtype=torch.bool)
    given = old_logprobs.contiguous(), advantages.contiguous(), every, buffer(ref_logprobs)

    blocks = triton.cdiv(head.chunk, BLOCK)
    # A last chunk may have fewer blocks.
    parts = part_sums(head.peaks, triton.cdiv(rows, head.chunk) * blocks * BLOCK).zero_()
    for number, part in enumerate(head.chunks()):
        head.statistics(part, logprobs, entropy)
        vectors = (slope, entropy_slope, logprobs, *given, entropy)
        slope_part, entropy_slope_part, *data = (None if x is None else x[part] for x in vectors)
        _policy.terms(
            parts[number * blocks :], slope_part, entropy_slope_part, 1.0, *data,
            clip_low, clip_high, dual_clip, kl_coef, entropy_coef,
        )  # fmt: skip
        if any(needs):
            head.gradient(part, entropy, slope, entropy_slope)
    loss, metrics = finish(parts, _policy.METRICS, wide(hidden.dtype), denominator, [])
    return loss, metrics, logprobs.to(loss.dtype), *head.gradients()
