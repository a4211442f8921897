"""Root mean square normalisation, as Llama's and Qwen's layers have it."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _layers, _library
from hiper_fast.ops._autograd import find_needs, make_recomputing
from hiper_fast.ops._numbers import check_not_negative


def _check(x, weight, eps):
    _layers.check_floats(x=x, weight=weight)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have shape [{x.shape[-1]}] like x's rows, got {list(weight.shape)}"
        )
    check_not_negative("eps", eps)


def _run_torch(x, weight, eps):
    return _normalize(x, eps)[0].to(x.dtype) * weight


def _run_torch_backward(grad, x, weight, eps, need_x, need_weight):
    normalized, inverse = _normalize(x, eps)
    grad = grad.to(normalized.dtype)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_x:
        of_normalized = grad * weight
        shared = (of_normalized * normalized).mean(-1, keepdim=True)
        grad_x = ((of_normalized - normalized * shared) * inverse).to(x.dtype)
    if need_weight:
        products = grad * normalized.to(x.dtype)
        grad_weight = products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x, grad_weight


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its rows' root mean squares, and one over those, [..., 1]; at least float32."""
    wide = x.to(_library.widen(x.dtype))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _run_cpp(x, weight, eps):
    if not _layers.fit_cpp(x, weight):
        return _run_torch(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    _layers.run_cpp("rms_norm", x, weight, *_shape_rows(x), eps, out)
    return out


def _run_cpp_backward(grad, x, weight, eps, need_x, need_weight):
    if not _layers.fit_cpp(grad, x, weight):
        return _run_torch_backward(grad, x, weight, eps, need_x, need_weight)
    tensors = grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, grad_weight = _make_gradients(*tensors, eps, need_x, need_weight)
    outs = grad_x if need_x else None, grad_weight if need_weight else None
    _layers.run_cpp("rms_norm_backward", *tensors, *_shape_rows(x), eps, *outs)
    return grad_x, grad_weight


def _shape_rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // max(width, 1), width


def _fake(x, weight, eps):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


def _make_gradients(grad, x, weight, eps, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(
        weight.shape if need_weight else 0
    )


_op = _library.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=_check,
    cpp=_run_cpp,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)
_op_backward = _library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool need_x, bool need_weight) -> "
    "(Tensor, Tensor)",
    check=lambda *_: None,
    cpp=_run_cpp_backward,
    plain=_run_torch_backward,
    cuda=True,
    fake=_make_gradients,
    module="rms_norm",
)
_call = make_recomputing("rms_norm", _op, _op_backward, tensors=2, wanted=2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Computed in float32, or float64 for float64 x; rounded to x's dtype before it is multiplied by
    the weight, as Llama does. Differentiable once in x and weight; backward keeps these two alone. The
    weight's gradient is summed in the same order every time, whatever the number of threads.

    Args:
        x: [..., h] float32, float64, bfloat16 or float16.
        weight: [h] of such a dtype.
        eps: at least 0 and finite.

    Returns:
        [..., h] of the dtype of x * weight.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    run = _call if any(find_needs("rms_norm", x, weight)) else _op
    return run(x, weight, eps)
