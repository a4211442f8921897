"""A token drawn of each row of logits, with its log-prob: one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _layers, _library, reference
from hiper_fast.ops._library import FLOATS, HALVES, check_vector
from hiper_fast.ops._numbers import is_readable


def _check(logits, uniform, temperature):
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [n, v] with v >= 1, got {list(logits.shape)}")
    if logits.dtype not in FLOATS:
        raise ValueError(
            f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}"
        )
    if logits.is_cuda and logits.dtype == torch.float64:
        raise ValueError("logits must be float32, bfloat16 or float16 on a GPU, got torch.float64")
    check_vector("uniform", uniform, logits.shape[0], (torch.float64,), logits.device)
    check_vector("temperature", temperature, logits.shape[0], (torch.float32,), logits.device)


def _run_reference(logits, uniform, temperature):
    _check_range("uniform", uniform, "lie in [0, 1)", (uniform >= 0) & (uniform < 1))
    fitting = (temperature >= 0) & temperature.isfinite()
    _check_range("temperature", temperature, "be at least 0 and finite", fitting)
    return reference.sample(logits, uniform, temperature)


def _check_range(name, vector, wanted, fitting):
    """What the C++ kernel checks too; on a GPU it would wait."""
    if is_readable(vector) and not fitting.all():
        index = int((~fitting).nonzero()[0])
        raise ValueError(f"{name} must {wanted}, got {float(vector[index]):f} at index {index}")


def _run_cpp(logits, uniform, temperature):
    logits = logits.float() if logits.dtype in HALVES else logits
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, logprobs = out = _fake(logits, uniform, temperature)
    given = uniform.contiguous(), temperature.contiguous(), *logits.shape, logits.stride(0)
    _layers.run_cpp("sample", logits, *given, tokens, logprobs)
    return out


def _fake(logits, uniform, temperature):
    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
    return tokens, temperature.new_empty(logits.shape[0])


_op = _library.define(
    "sample(Tensor logits, Tensor uniform, Tensor temperature) -> (Tensor, Tensor)",
    check=_check,
    cpp=_run_cpp,
    plain=_run_reference,
    cuda=True,
    fake=_fake,
)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row by softmax(logits / temperature), and its log-prob under that distribution.

    A draw inverts the distribution function: it is the first token at which the sum of the probabilities
    exceeds the row's uniform number, which is right to what float32 probabilities allow. It depends on its own row
    alone. A token of probability 0, as a logit of minus infinity has, never comes. Temperature 0 is greedy: the
    first of the largest logits, with the log-prob at temperature 1.

    Args:
        logits: [n, v] float32, bfloat16 or float16, on the CPU also float64; v at least 1. Rows may lie apart.
        uniform: float64 [n], in [0, 1).
        temperature: float32 [n], at least 0 and finite.

    Returns:
        tokens: int64 [n].
        logprobs: float32 [n], at most 0, detached from autograd. A row without a distribution (NaN or plus infinity
            among its logits, or nothing but minus infinity) gives token 0 and a log-prob of NaN.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    return _op(logits, uniform, temperature)
