"""silu(gate) * up, and its gradients, in one launch each.

s = 1 / (1 + exp(-gate)), out = gate s up;   grad_up = grad gate s, grad_gate = grad up s (1 + gate (1 - s))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._tuning import constants


@triton.jit
def _load(x, place, count, DTYPE: tl.constexpr):
    return tl.load(x + place, mask=place < count, other=0.0).to(DTYPE)


@triton.jit
def _place(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(gate, up, out, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    place = _place(BLOCK)
    x = _load(gate, place, count, DTYPE)
    result = x / (1.0 + tl.exp(-x)) * _load(up, place, count, DTYPE)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _backward_kernel(
    grad, gate, up, grad_gate, grad_up, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    place = _place(BLOCK)
    x, given = _load(gate, place, count, DTYPE), _load(grad, place, count, DTYPE)
    s = 1.0 / (1.0 + tl.exp(-x))
    of_gate = given * _load(up, place, count, DTYPE) * s * (1.0 + x * (1.0 - s))
    tl.store(grad_gate + place, of_gate.to(grad_gate.dtype.element_ty), mask=place < count)
    tl.store(grad_up + place, (given * x * s).to(grad_up.dtype.element_ty), mask=place < count)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch(_forward_kernel, "swiglu._forward_kernel", gate, up, out)
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    """Both, whichever is needed: what they have in common is nearly all of it."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grads = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward_kernel, "swiglu._backward_kernel", grad, gate, up, *grads)
    return grads


def _launch(kernel, name: str, *tensors: Tensor) -> None:
    first, dtype = tensors[0], tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    if not first.numel():
        return
    tile = constants(name, first.device, BLOCK=1024, num_warps=4)
    with on_device(first):
        kernel[(triton.cdiv(first.numel(), tile["BLOCK"]),)](
            *tensors, first.numel(), DTYPE=dtype, **tile, enable_fp_fusion=True
        )
