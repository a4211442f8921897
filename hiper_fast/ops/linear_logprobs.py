"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops._library import check_vector

_HALF_OR_FLOAT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Logits held at a time: 64 MiB of float32 on the CPU, 512 MiB on a GPU.
_CHUNK = {"cpu": 2**24, "cuda": 2**27}


class _LinearLogprobs(torch.autograd.Function):
    """Forward keeps no logits, only each row's entropy; backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, want_entropy):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        rows = hidden.shape[0]
        logprobs = hidden.new_empty(rows, dtype=dtype)
        entropy = hidden.new_empty(rows if want_entropy else 0, dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, log_p in _chunks(hidden, weight.to(dtype), bias, temperature, dtype):
                # Rounding must not make a probability exceed 1: a positive log-prob can run away in PPO.
                logprobs[part] = log_p.gather(1, targets[part, None]).squeeze(1).clamp_(max=0)
                if want_entropy:
                    entropy[part] = log_p.exp().mul_(log_p).sum(dim=1).neg_()
        ctx.save_for_backward(hidden, weight, targets, bias, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, bias, entropy = ctx.saved_tensors
        dtype = entropy.dtype
        need_hidden, need_weight, _, need_bias, _, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        wide_weight = weight.to(dtype)
        for part, log_p in _chunks(hidden, wide_weight, bias, ctx.temperature, dtype):
            # With p = softmax(z): d logprob / dz = onehot - p, d entropy / dz = -p (log p + entropy).
            scale = grad_logprobs[part, None]
            if len(entropy):
                scale = scale + grad_entropy[part, None] * (log_p + entropy[part, None])
            grad_logits = log_p.exp_().mul_(-scale)
            grad_logits.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad_logits.div_(ctx.temperature)
            if need_hidden:
                grad_hidden[part] = (grad_logits @ wide_weight).to(hidden.dtype)
            if need_weight:
                grad_weight.addmm_(grad_logits.T, hidden[part].to(dtype))
            if need_bias:
                grad_bias += grad_logits.sum(dim=0)
        return grad_hidden, grad_weight, None, grad_bias, None, None


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype):
    """Slices of rows, each with the log-probabilities of all tokens in `dtype`; weight comes in `dtype`."""
    size = max(1, _CHUNK.get(hidden.device.type, 2**24) // weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        logits = hidden[part].to(dtype) @ weight.T
        if bias is not None:
            logits += bias.to(dtype)
        yield part, torch.log_softmax(logits.div_(temperature), dim=1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax((hidden @ weight.T + bias) / temperature)[targets], in chunks of rows.

    Differentiable once in hidden, weight and bias, through logprobs and entropy. Inputs of half precision are
    multiplied, summed and returned in float32. A log-prob never exceeds 0.

    Args:
        hidden: [n, h] float32, float64, bfloat16 or float16.
        weight: [v, h] of such a dtype.
        targets: int64 [n], in [0, v).
        temperature: divides the logits, above 0.
        bias: [v] or None.
        entropy: also return each row's entropy, in nats.

    Returns:
        logprobs [n], or (logprobs [n], entropy [n]); float32, or float64 for float64 inputs.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    check_linear(hidden, weight, targets, temperature, bias)
    logprobs, entropies = _LinearLogprobs.apply(hidden, weight, targets, bias, float(temperature), entropy)
    return (logprobs, entropies) if entropy else logprobs


def check_linear(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None) -> None:
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(matrix.shape)}")
        if matrix.dtype not in _HALF_OR_FLOAT:
            raise ValueError(f"{name} must be of a floating dtype, got {matrix.dtype}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape [v, {hidden.shape[1]}] like hidden, got {list(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} like hidden, got {weight.device}")
    check_vector("targets", targets, hidden.shape[0], (torch.int64,), hidden.device)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], _HALF_OR_FLOAT, hidden.device)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if targets.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets must lie in [0, {weight.shape[0]}), got {low if low < 0 else high}")
