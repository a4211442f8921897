"""Rotary position embeddings of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _layers, _library
from hiper_fast.ops._autograd import find_needs, make_recomputing


def _check(query, key, cos, sin, _):
    _layers.check_floats(query=query, key=key, cos=cos, sin=sin)
    if query.dim() != 4 or query.shape[-1] % 2:
        raise ValueError(
            f"query must have shape [batch, heads, tokens, d] with d even, got {list(query.shape)}"
        )
    batch, _, tokens, d = query.shape
    if key.dim() != 4 or (key.shape[0], *key.shape[2:]) != (batch, tokens, d):
        raise ValueError(
            f"key must have shape [{batch}, heads, {tokens}, {d}] like query, got {list(key.shape)}"
        )
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape not in ((batch, tokens, d), (1, tokens, d)):
            raise ValueError(
                f"{name} must have shape [{batch}, {tokens}, {d}] or [1, {tokens}, {d}], got {list(angles.shape)}"
            )
        if angles.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it gets none; detach() it")
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must be {query.dtype} like query, got {tensor.dtype}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have shape {list(cos.shape)} like cos, got {list(sin.shape)}")


def _run_torch(query, key, cos, sin, back):
    return tuple(_turn_torch(x, cos[:, None], sin[:, None], back) for x in (query, key))


def _turn_torch(x, cos, sin, back):
    if back:
        first, second = (x * sin).chunk(2, -1)
        turned = torch.cat([second, -first], -1)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1) * sin
    return _make_out(x).copy_(x * cos + turned)


def _run_cpp(query, key, cos, sin, back):
    if not _layers.fit_cpp(query):
        return _run_torch(query, key, cos, sin, back)
    cos, sin = cos.contiguous(), sin.contiguous()
    return tuple(_turn_cpp(x, cos, sin, back) for x in (query, key))


def _turn_cpp(x, cos, sin, back):
    x = x if x.stride(-1) == 1 else x.contiguous()
    out, shared = _make_out(x), len(cos) < len(x)
    _layers.run_cpp("rope", x, cos, sin, *x.shape, *x.stride()[:3], shared, back, out)
    return out


def _make_out(x: Tensor) -> Tensor:
    """[batch, heads, tokens, d], laid out as [batch, tokens, heads, d], as attention reads and makes it."""
    batch, heads, tokens, d = x.shape
    return x.new_empty((batch, tokens, heads, d)).transpose(1, 2)


def _fake(query, key, cos, sin, back):
    return _make_out(query), _make_out(key)


_op = _library.define(
    "rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    check=_check,
    cpp=_run_cpp,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)


def _differentiate(grad_query, grad_key, cos, sin, *_):
    return _op(grad_query, grad_key, cos, sin, True)


_call = make_recomputing("rope", _op, _differentiate, tensors=4, wanted=2, kept=(2, 3))


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin of query and key, where rotate_half([a, b]) = [-b, a] of a head's two halves.

    Strides are read as they are where a head lies in one piece, as after a transpose. Differentiable once in
    query and key; backward, which turns back, keeps cos and sin alone.

    Args:
        query: [batch, heads, tokens, d] float32, float64, bfloat16 or float16, d even.
        key: [batch, heads of its own, tokens, d] of that dtype.
        cos, sin: [batch, tokens, d] or [1, tokens, d] of that dtype, without gradient.

    Returns:
        query and key, turned; of their shapes and dtype, laid out as [batch, tokens, heads, d].

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    run = _call if any(find_needs("rope", query, key)) else _op
    return run(query, key, cos, sin, False)
