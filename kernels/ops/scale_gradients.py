"""Gradients times a number that only the GPU knows, in place; where that is 1, which it is mostly, nothing is read."""

import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._tuning import constants

_PROGRAMS = 1024  # at most: each goes on to the block that comes so many later


@triton.jit
def _kernel(gradient, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by == 1:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, count, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        scaled = tl.load(gradient + place, mask=place < count).to(by.dtype) * by
        tl.store(gradient + place, scaled.to(gradient.dtype.element_ty), mask=place < count)


def scale_gradients(gradients: list[Tensor], factor: Tensor) -> None:
    sizes = {"BLOCK": 4096, "PROGRAMS": _PROGRAMS, "num_warps": 8}
    for gradient in filter(Tensor.numel, gradients):
        tile = dict(constants("scale_gradients._kernel", gradient.device, **sizes))
        count, most = gradient.numel(), tile.pop("PROGRAMS")
        with on_device(gradient):
            _kernel[(min(triton.cdiv(count, tile["BLOCK"]), most),)](
                gradient, factor, count, **tile, enable_fp_fusion=True
            )
