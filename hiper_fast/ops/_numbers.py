"""The checks of the ops' numbers: int, float or what counts as real (NumPy's scalars do), never a bool."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

_NUMBERS = (Real, torch.SymFloat, torch.SymInt)


def check_finite(name: str, value: float) -> None:
    if not (_is_number(value) and -math.inf < value < math.inf):
        _refuse(name, "finite", value)


def check_fraction(name: str, value: float) -> None:
    if not (_is_number(value) and 0 <= value <= 1):
        _refuse(name, "in [0, 1]", value)


def check_not_negative(name: str, value: float) -> None:
    if not (_is_number(value) and 0 <= value < math.inf):
        _refuse(name, "at least 0 and finite", value)


def check_above(name: str, value: float, bound: float, otherwise: str = "") -> None:
    if not (_is_number(value) and bound < value < math.inf):
        _refuse(name, f"above {bound} and finite{otherwise}", value)


def check_count(name: str, value: int) -> None:
    if not (isinstance(value, Integral) and not isinstance(value, bool) and value >= 0):
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def check_divisor(name: str, value: Tensor) -> None:
    """A tensor to divide by. Its value is read where that is free: on the CPU, outside of tracing."""
    if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} must be a number or a real tensor without dimensions, got {dtype} of shape {list(value.shape)}"
        )
    if is_readable(value) and not 0 < value.item() < math.inf:
        _refuse(name, "above 0 and finite", value.item())


def is_readable(tensor: Tensor) -> bool:
    """On a GPU a value is there only when all that is queued has run; traced and fake tensors have none."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def _is_number(value: object) -> bool:
    return type(value) is float or (isinstance(value, _NUMBERS) and not isinstance(value, bool))


def _refuse(name: str, wanted: str, value: object) -> None:
    if not _is_number(value):
        raise ValueError(f"{name} must be a number, {wanted}, got {type(value).__name__}")
    raise ValueError(f"{name} must be {wanted}, got {value}")
