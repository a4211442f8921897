"""What all ops share: the compiled extension, the namespace torch.ops.hiper_fast, the argument checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

try:
    from hiper_fast import _C as extension

    why_no_extension = ""
except ImportError as error:
    extension = None
    why_no_extension = (
        f"the C++ kernels cannot be loaded ({error}); install a C++17 compiler and run "
        "`pip install -e .` (or reinstall hiper_fast) to build them"
    )
    warnings.warn(f"hiper_fast runs on the slow torch reference: {why_no_extension}", stacklevel=2)

FLOATS = (torch.float32, torch.float64)

_library = torch.library.Library("hiper_fast", "DEF")


def define(schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable) -> Callable:
    """Register one op: its schema, its kernels and its fake kernel. Returns the callable op.

    cuda None: the tensors are copied to the host, and the result back.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    op = getattr(torch.ops.hiper_fast, name).default
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda or _through_host(op), "CUDA")
    torch.library.register_fake(f"hiper_fast::{name}", fake, lib=_library)
    return op


def kernel(name: str, dtype: torch.dtype) -> Callable:
    """The C++ kernel of that name for that dtype."""
    return getattr(extension, f"{name}_{str(dtype).removeprefix('torch.')}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _through_host(op: Callable) -> Callable:
    def on_host(*arguments):
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        result = op(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))
        return result.to(device) if isinstance(result, Tensor) else tuple(r.to(device) for r in result)

    return on_host


def check_vector(name: str, tensor: Tensor, length: int | None, dtypes, device: torch.device | None) -> None:
    """One dimension, `length` elements (None: any), one of `dtypes`, on `device` (None: any)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = tensor.shape
    if len(shape) != 1 or (length is not None and shape[0] != length):
        wanted = "one dimension" if length is None else f"shape [{length}]"
        raise ValueError(f"{name} must have {wanted}, got shape {list(shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def check_cu(name: str, cu: Tensor, device: torch.device | None) -> int:
    """int32, one dimension, at least one element; returns the number of segments. Not its values."""
    check_vector(name, cu, None, (torch.int32,), device)
    if cu.shape[0] == 0:
        raise ValueError(f"{name} must have at least one element, the leading 0")
    return cu.shape[0] - 1


def check_prefix_sum(name: str, cu: Tensor, total: int) -> None:
    """`cu` begins with 0, never falls and ends with `total`. The C++ kernels check the same."""
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {values[0]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(f"{name} must never fall, but falls from {values[i - 1]} to {values[i]} at index {i}")
    if values[-1] != total:
        raise ValueError(f"{name} must end with {total}, got {values[-1]}")
