"""The policy loss of a token, forward and gradient; and the sums of its terms. Used by ppo_loss and linear_ppo.

    r = exp(logprob - old), pg = max(-A r, -A clip(r)), for A < 0 at most -A dual_clip
    d = ref - logprob, kl = clamp(exp(d) - d - 1, -10, 10);   loss = pg + kl_coef kl - entropy_coef entropy

    d pg / d logprob = -A r where neither clip nor dual clip holds, else 0;   d kl / d logprob = 1 - exp(d)

As on the CPU, the exponents are bounded at 20, where every branch is clipped long since.
"""

import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._total import BLOCK, store_part
from hiper_fast.kernels._tuning import constants
from hiper_fast.kernels._vectors import are_aligned, read, write

METRICS = 6  # policy, approx_kl, clip_fraction, dual_clip_fraction, kl, entropy


# Parts of vectors begin anywhere: nothing is to be compiled for where they do.
@triton.jit(
    do_not_specialize=["tokens", "aligned"],
    do_not_specialize_on_alignment=[
        "logprobs", "old_logprobs", "advantages", "loss_mask", "ref_logprobs", "entropy",
        "gradient", "gradient_entropy",
    ],
)  # fmt: skip
def _terms_kernel(
    logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy, parts, gradient, gradient_entropy,
    tokens, aligned, clip_low: tl.float64, clip_high: tl.float64, dual_clip: tl.float64, kl_coef: tl.float64,
    entropy_coef: tl.float64, scale: tl.float64,
    HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t = program * BLOCK + tl.arange(0, BLOCK)
    whole = (aligned != 0) & ((program + 1) * BLOCK <= tokens)
    counted = read(loss_mask, t, tokens, whole) != 0
    dtype: tl.constexpr = logprobs.dtype.element_ty
    logprob = tl.where(counted, read(logprobs, t, tokens, whole), 0.0)
    old = tl.where(counted, read(old_logprobs, t, tokens, whole), 0.0)
    gain = tl.where(counted, read(advantages, t, tokens, whole), 0.0)

    log_ratio = logprob - old
    ratio = tl.exp(tl.where(log_ratio > 20, 20.0, log_ratio))
    near = tl.minimum(
        tl.maximum(ratio, tl.full([], 1 - clip_low, dtype)), tl.full([], 1 + clip_high, dtype)
    )
    plain, clipped = -gain * ratio, -gain * near
    single = tl.where(clipped > plain, clipped, plain)
    bound = tl.where(gain < 0, -gain * tl.full([], dual_clip, dtype), float("inf"))
    policy = tl.where(single > bound, bound, single)
    slope = tl.where((clipped > plain) | (single > bound) | (log_ratio > 20), 0.0, plain)
    loss = policy
    nothing = tl.zeros([BLOCK], dtype)
    kl, spread = nothing, nothing
    if HAS_REF:
        d = tl.where(counted, read(ref_logprobs, t, tokens, whole), 0.0) - logprob
        far = d > 20
        d = tl.where(far, 20.0, d)
        kl = tl.exp(d) - d - 1
        slope += tl.full([], kl_coef, dtype) * tl.where(far | (kl > 10), 0.0, 1 - tl.exp(d))
        kl = tl.where(kl > 10, 10.0, kl)
        loss += tl.full([], kl_coef, dtype) * kl
    if HAS_ENTROPY:
        spread = tl.where(counted, read(entropy, t, tokens, whole), 0.0)
        loss -= tl.full([], entropy_coef, dtype) * spread
    one = tl.full([], 1.0, dtype)
    store_part(
        parts, program, loss, policy, -log_ratio, tl.where(clipped > plain, one, 0.0),
        tl.where(single > bound, one, 0.0), kl, spread, tl.where(counted, one, 0.0),
    )  # fmt: skip
    slope = tl.where(counted, slope * tl.full([], scale, dtype), 0.0)
    write(gradient, t, slope, tokens, whole)
    if HAS_ENTROPY:
        push = tl.where(counted, tl.full([], -entropy_coef * scale, dtype), 0.0)
        write(gradient_entropy, t, push, tokens, whole)


def terms(
    parts: Tensor, gradient: Tensor, gradient_entropy: Tensor | None, scale: float,
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, ref_logprobs: Tensor | None,
    entropy: Tensor | None, clip_low: float, clip_high: float, dual_clip: float, kl_coef: float, entropy_coef: float,
) -> None:  # fmt: skip
    """Writes the terms' sums to parts [blocks, 8], and the gradients of the loss's sum times scale.

    Tensors are contiguous and of one dtype, float32 or float64.
    """
    tokens = logprobs.shape[0]
    given = logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, entropy
    made = gradient, gradient_entropy
    if tokens:
        # With the limit named, ptxas does not spill a register or two to fit one program more.
        with on_device(logprobs):
            _terms_kernel[(triton.cdiv(tokens, BLOCK),)](
                *given, parts, *made, tokens, are_aligned(*given, *made),
                clip_low, clip_high, dual_clip, kl_coef, entropy_coef, scale,
                HAS_REF=ref_logprobs is not None, HAS_ENTROPY=entropy is not None, BLOCK=BLOCK,
                **constants("_policy._terms_kernel", logprobs.device, num_warps=4),
                maxnreg=168, enable_fp_fusion=True,
            )  # fmt: skip
