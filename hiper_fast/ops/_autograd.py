"""How the ops are differentiated: once, in reverse mode. Everything else is refused by the op's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hiper_fast.ops._scale import scale_gradients


def find_needs(op: str, *tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of the op's differentiable arguments need a gradient; an error where one has a tangent."""
    enabled = torch.is_grad_enabled()
    needs = []
    for tensor in tensors:
        known = isinstance(tensor, Tensor)
        if known and unpack_dual(tensor).tangent is not None:
            refuse_forward_mode(op)
        needs.append(known and enabled and tensor.requires_grad)
    return tuple(needs)


def refuse_forward_mode(op: str) -> None:
    raise NotImplementedError(
        f"ops.{op} has no forward-mode derivative (jvp, jacfwd, dual tensors): it is differentiable once, "
        "in reverse mode (backward, torch.func.grad, torch.func.vjp)"
    )


def make_differentiable(op: str, run: Callable, places: Sequence[int], *, tensors: int) -> Callable:
    """A call of `run`, of `tensors` tensors and then options, which gives (loss, what has no gradient, the loss's
    gradients by its arguments at `places`), once differentiable.

    The gradients are made with the loss; backward scales them in place and hands them over. From then on the graph has
    none: only a second backward over it makes them anew, which takes as long as the loss.
    """

    class Loss(torch.autograd.Function):
        @staticmethod
        @binds_at_once
        def forward(*arguments):
            return run(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, *others = output
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors])
            ctx.mark_non_differentiable(*others)
            ctx.options = inputs[tensors:]
            ctx.gradients = others[-len(places) :]

        @staticmethod
        def backward(ctx, gradient, *_):
            if gradient is None:
                return (None,) * len(ctx.needs_input_grad)
            found = dict(zip(places, scale(ctx, gradient), strict=True))
            return tuple(
                found.get(place) if need else None
                for place, need in enumerate(ctx.needs_input_grad)
            )

    def scale(ctx, gradient: Tensor) -> Sequence[Tensor]:
        """The loss's gradients times `gradient`; with create_graph differentiable in that."""
        gradients = ctx.gradients
        if gradients is None:
            with torch.no_grad():
                gradients = run(*ctx.saved_tensors, *ctx.options)[-len(places) :]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            constants = refuse_twice(op, gradients, *ctx.saved_tensors)
            return [constant * gradient.to(constant.dtype) for constant in constants]
        ctx.gradients = None
        scale_gradients(gradients, gradient)
        return gradients

    return refuse_forward_over_reverse(op, Loss)


def make_recomputing(
    op: str,
    run: Callable,
    run_backward: Callable,
    *,
    tensors: int,
    wanted: int,
    kept: Sequence[int] | None = None,
) -> Callable:
    """A call of `run`, of `tensors` tensors and then options, once differentiable in its first `wanted` arguments.

    Saved for backward are the tensors at the places `kept`, by default all, and nothing of what is made of them:
    `run_backward` takes the results' gradients, those tensors, the options, and which of the `wanted` gradients are
    needed; it gives all of those.
    """
    saved_places = tuple(range(tensors)) if kept is None else tuple(kept)

    class Recomputed(torch.autograd.Function):
        @staticmethod
        @binds_at_once
        def forward(*arguments):
            return run(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*(inputs[place] for place in saved_places))
            ctx.options = inputs[tensors:]

        @staticmethod
        def backward(ctx, *gradients):
            needs, saved = ctx.needs_input_grad[:wanted], ctx.saved_tensors
            with torch.no_grad():
                grads = run_backward(*gradients, *saved, *ctx.options, *needs)
            grads = refuse_twice(op, grads, *gradients, *saved)
            named = (grad if need else None for grad, need in zip(grads, needs, strict=True))
            return *named, *(None,) * (tensors - wanted + len(ctx.options))

    return refuse_forward_over_reverse(op, Recomputed)


def refuse_twice(op: str, gradients: Sequence[Tensor], *roots: Tensor | None) -> Sequence[Tensor]:
    """The gradients of `op`, which depend on `roots`: with create_graph, where autograd would take them for
    constants, their own derivative raises an error."""
    if not torch.is_grad_enabled():
        return gradients
    return _Refuse.apply(op, len(gradients), *gradients, *roots)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        _, count, *tensors = arguments
        return tuple(gradient.detach() for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"ops.{ctx.op} has no second derivative: it is differentiable once, in reverse mode; "
            "detach() its gradient to use it as a constant"
        )


def refuse_forward_over_reverse(op: str, function: type[torch.autograd.Function]) -> Callable:
    """A call of `function`, in which a tangent may lie hidden, as in jvp(grad(f))."""

    class Eager(function):  # torch.compile takes no Function that has a jvp
        @staticmethod
        def jvp(ctx, *_):
            refuse_forward_mode(op)

    def call(*arguments):
        return (function if torch.compiler.is_compiling() else Eager).apply(*arguments)

    return call


def binds_at_once(forward: Callable) -> Callable:
    """`forward(*arguments)` with a signature that costs nothing to bind: Function.apply does so at every
    call, which else takes as long as the rest of it."""
    forward.__signature__ = _Arguments()
    return forward


class _Arguments(inspect.Signature):
    def bind(self, *arguments):
        return _Bound(arguments, {})


class _Bound(NamedTuple):
    args: tuple
    kwargs: dict

    def apply_defaults(self) -> None: ...
