"""What the launch functions share."""

import contextlib

import torch
from torch import Tensor

from hiper_fast.kernels._errors import raise_pending


def on_device(tensor: Tensor):
    """Around a launch. Triton launches on the current GPU: make it the tensor's (on the CPU the interpreter runs).

    Raises what earlier kernels reported.
    """
    raise_pending(synchronize=False)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def buffer(tensor: Tensor | None) -> Tensor | None:
    """What the kernels read: contiguous, and float32 for half precision (the row kernels of _head.py take both)."""
    return None if tensor is None else tensor.to(wide(tensor.dtype)).contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results and sums for inputs of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)
