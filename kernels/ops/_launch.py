"""What the launch functions share."""

import contextlib
import functools
import os

import torch
from torch import Tensor

from hiper_fast.kernels._errors import raise_pending

SYNC_ERRORS = os.environ.get("HIPER_FAST_SYNC_ERRORS") == "1"


def on_device(tensor: Tensor):
    """Around a launch. Triton launches on the current GPU: make it the tensor's (on the CPU the interpreter runs).

    Raises what earlier kernels reported, and with HIPER_FAST_SYNC_ERRORS=1 what these do.
    """
    raise_pending(synchronize=False)
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return _raising(device, tensor) if SYNC_ERRORS else device


@contextlib.contextmanager
def _raising(device, tensor: Tensor):
    with device:
        yield
    if not is_capturing(tensor):
        raise_pending()


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is launched for the tensor goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def count_processors(device: torch.device, elsewhere: int) -> int:
    """The GPU's multiprocessors; `elsewhere`: what stands for them where there is none."""
    if device.type != "cuda":
        return elsewhere
    return torch.cuda.get_device_properties(device).multi_processor_count


def buffer(tensor: Tensor | None) -> Tensor | None:
    """What the kernels read: contiguous, and float32 for half precision (the row kernels of _head.py take both)."""
    return None if tensor is None else tensor.to(wide(tensor.dtype)).contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results and sums for inputs of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)
