"""The gated activation of Llama's and Qwen's feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from hiper_fast.ops import _layers, _library
from hiper_fast.ops._autograd import find_needs, make_recomputing


def _check(gate, up):
    _layers.check_floats(gate=gate, up=up)
    _layers.check_alike(gate=gate, up=up)


def _run_torch(gate, up):
    return silu(gate) * up


def _run_torch_backward(grad, gate, up, *_):
    wide = gate.to(_library.widen(gate.dtype))
    part = wide.sigmoid()
    slope = part * (1 + wide * (1 - part))
    return (grad * up * slope).to(gate.dtype), (grad * wide * part).to(gate.dtype)


def _run_cpp(gate, up):
    if not _layers.fit_cpp(gate):
        return _run_torch(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _layers.run_cpp("swiglu", gate, up, gate.numel(), out)
    return out


def _run_cpp_backward(grad, gate, up, *_):
    if not _layers.fit_cpp(grad, gate):
        return _run_torch_backward(grad, gate, up)
    tensors = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = outs = torch.empty_like(tensors[1]), torch.empty_like(tensors[1])
    _layers.run_cpp("swiglu_backward", *tensors, gate.numel(), *outs)
    return grad_gate, grad_up


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _fake_backward(grad, gate, up, *_):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_op = _library.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    check=_check,
    cpp=_run_cpp,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)
_op_backward = _library.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, bool need_gate, bool need_up) -> (Tensor, Tensor)",
    check=lambda *_: None,
    cpp=_run_cpp_backward,
    plain=_run_torch_backward,
    cuda=True,
    fake=_fake_backward,
    module="swiglu",
)
_call = make_recomputing("swiglu", _op, _op_backward, tensors=2, wanted=2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    Computed in at least float32 where a kernel has it, and rounded once. Differentiable once in both; backward keeps
    these two alone.

    Args:
        gate, up: of one shape and dtype: float32, float64, bfloat16 or float16.

    Returns:
        Of their shape and dtype, contiguous.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    run = _call if any(find_needs("swiglu", gate, up)) else _op
    return run(gate, up)
