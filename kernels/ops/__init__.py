"""Triton kernels for NVIDIA GPUs, one file per op; hiper_fast.ops loads them with the first CUDA tensor."""

from hiper_fast.kernels._errors import raise_pending

__all__ = ["raise_pending"]
