"""Norms, gated activations and rotary embeddings by the fused ops, in the modules that are measured to be those.

Not read off a class: on random numbers a module must give what the op gives. All else stays as the model has it. A
module keeps its class, its parameters and its hooks, and a copy of it is fused too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hiper_fast import ops
from hiper_fast.agent.head import replaced

ROTATE = "apply_rotary_pos_emb"  # what transformers' attention calls it
SEED = 2602_16165
# Of random numbers: where eps counts, where it does not, and where an activation may have a limit.
SCALES = 1e-3, 1.0, 30.0
# Relative, of a few roundings. Norms that round float64 to float32 inside stay the model's own.
TOLERANCE = {
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def use(model: nn.Module) -> None:
    """Has the modules of `model` that are such formulas compute them by the fused ops."""
    for module in model.modules():
        forward = find_norm(module) or find_swiglu(module) or find_rotation(type(module).forward)
        if forward is not None:
            module.forward = MethodType(forward, module)


def find_norm(module: nn.Module) -> Callable | None:
    """A forward of `ops.rms_norm`, if the module is that."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or not takes_one(module):
        return None
    if module.weight.dim() != 1 or module.weight.dtype not in TOLERANCE:
        return None
    width = len(module.weight)
    weight, rows = draw(width).to(module.weight), draw(4, width).to(module.weight)
    rows += 0.5  # a mean, which must not be taken off
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        own = partial(functional_call, module, {"weight": weight})
        if agree(own, partial(ops.rms_norm, weight=weight, eps=eps), rows):
            return lambda self, hidden: ops.rms_norm(hidden, self.weight, eps)
    return None


def find_swiglu(module: nn.Module) -> Callable | None:
    """A forward with `ops.swiglu` between three projections, if the module is that."""
    projections = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(isinstance(p, nn.Module) for p in projections) or not takes_one(module):
        return None

    def forward(self, hidden):
        return self.down_proj(ops.swiglu(self.gate_proj(hidden), self.up_proj(hidden)))

    steps = (lambda x: x), (lambda x: x.flip(-1) + 1), (lambda x: 2 * x)
    with contextlib.ExitStack() as stack:
        for projection, step in zip(projections, steps, strict=True):
            stack.enter_context(replaced(projection, step))
        return forward if agree(module, MethodType(forward, module), draw(4, 64)) else None


@cache
def find_rotation(forward: Callable) -> Callable | None:
    """An attention's forward that rotates by `ops.rope`, if it rotates so: the same code with one other global."""
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return None
    own = forward.__globals__[ROTATE]
    key, cos, sin = draw(2, 1, 5, 8), draw(2, 5, 8), draw(2, 5, 8)

    def join(rotation: Callable, query: Tensor) -> Tensor:
        return torch.cat(rotation(query, key, cos, sin), 1)

    if not agree(partial(join, own), partial(join, ops.rope), draw(2, 3, 5, 8)):
        return None

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *others, **options):
        whole = cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        alike = query.dtype == key.dtype == cos.dtype
        if others or options or not whole or not alike:
            return own(query, key, cos, sin, *others, **options)
        return ops.rope(query, key, cos, sin)

    names = forward.__globals__ | {ROTATE: rotate}
    fused = FunctionType(forward.__code__, names, None, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return update_wrapper(fused, forward)


def takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + sum(shape)))


@torch.no_grad()
def agree(own: Callable, fused: Callable, x: Tensor) -> bool:
    """Whether both give the same for random x, but for rounding; not if `own` takes no such x."""
    tolerance = TOLERANCE[x.dtype]
    for scale in SCALES:
        try:
            found = own(scale * x)
        except Exception:  # whatever a stranger's module raises
            return False
        wanted = fused(scale * x)
        if not isinstance(found, Tensor):
            return False
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            return False
        near = tolerance * float(wanted.abs().mean())
        if not torch.allclose(found, wanted, rtol=tolerance, atol=near):
            return False
    return True
