"""What the layers' ops share: which tensors the C++ kernels take, and the checks of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._library import FLOATS

CPP = (torch.float32, torch.float64)  # half precision runs as torch operations on the CPU


def fit_cpp(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that the C++ kernels have."""
    return tensors[0].dtype in CPP and all(x.dtype == tensors[0].dtype for x in tensors)


def run_cpp(kernel: str, *arguments: Tensor | int | float | None) -> None:
    """The C++ kernel for the first argument's dtype, on the tensors' addresses; None is a null pointer."""
    given = (
        _library.find_address(x) if x is None or isinstance(x, Tensor) else x for x in arguments
    )
    _library.find_kernel(kernel, arguments[0].dtype)(*given, torch.get_num_threads())


def check_floats(**tensors: Tensor) -> None:
    """All are tensors of a floating dtype, on one device."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on {first.device} like the other tensors, got {tensor.device}"
            )


def check_alike(**tensors: Tensor) -> None:
    """All are of the first one's shape and dtype."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have shape {list(first.shape)} like {first_name}, got {list(tensor.shape)}"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} must be {first.dtype} like {first_name}, got {tensor.dtype}")
