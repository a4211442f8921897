"""Root mean square normalisation: whole rows in a tile, forward and backward one launch each.

inverse = 1 / sqrt(mean(x^2) + eps), n = x inverse, out = n weight;
with g = grad weight: grad_x = inverse (g - n mean(g n)), grad_weight = sum over rows of grad n

n is rounded to x's dtype before the product, as Llama does. Each program of the backward pass goes over rows of its
own and writes one sum for the weight; their number depends on the rows alone, and so does the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device, wide
from hiper_fast.kernels._tuning import constants

# Elements of a tile, which is at least one row, and of a row those that a warp takes.
_TILE, _OF_WARP = 2048, 512
_PROGRAMS = 512  # of a backward pass


@triton.jit
def _rows(x, row, rows, column, width, dtype: tl.constexpr):
    """A tile [ROWS, BLOCK] of x, 0 outside."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    places = row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(x + places, mask=inside, other=0.0).to(dtype), places, inside


@triton.jit
def _inverse(x, width, eps, dtype: tl.constexpr):
    mean = tl.sum(x * x, axis=1) / tl.full([], width, dtype)
    return (1.0 / tl.sqrt(mean + tl.full([], eps, dtype)))[:, None]


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, out, rows, width, eps: tl.float64, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    tile, places, inside = _rows(x, row, rows, column, width, DTYPE)
    normal = (tile * _inverse(tile, width, eps, DTYPE)).to(x.dtype.element_ty).to(DTYPE)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(DTYPE)
    tl.store(out + places, (normal * scale[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward_kernel(
    grad, x, weight, grad_x, sums, rows, width, steps, eps: tl.float64,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(DTYPE)
    total = tl.zeros([BLOCK], DTYPE)
    for step in range(0, steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        tile, places, inside = _rows(x, row, rows, column, width, DTYPE)
        inverse = _inverse(tile, width, eps, DTYPE)
        normal = tile * inverse
        given = tl.load(grad + places, mask=inside, other=0.0).to(DTYPE)
        if NEED_X:
            slope = given * scale[None, :]
            shared = tl.sum(slope * normal, axis=1) / tl.full([], width, DTYPE)
            found = (slope - normal * shared[:, None]) * inverse
            tl.store(grad_x + places, found.to(grad_x.dtype.element_ty), mask=inside)
        if NEED_WEIGHT:
            total += tl.sum(given * normal.to(x.dtype.element_ty).to(DTYPE), axis=0)
    if NEED_WEIGHT:
        tl.store(sums + program.to(tl.int64) * width + column, total, mask=column < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    if x.numel():
        rows, options = _shape(x, "rms_norm._forward_kernel")
        with on_device(x):
            _forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
                x, weight, out, rows, x.shape[-1], eps, **options
            )
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    if not x.numel():
        return grad_x, torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    rows, options = _shape(x, "rms_norm._backward_kernel")
    most = constants("rms_norm.programs", x.device, PROGRAMS=_PROGRAMS)["PROGRAMS"]
    programs = min(triton.cdiv(rows, options["ROWS"]), most)
    steps = triton.cdiv(rows, options["ROWS"] * programs)
    sums = x.new_empty((programs, x.shape[-1]) if need_weight else 0, dtype=wide(x.dtype))
    with on_device(x):
        _backward_kernel[(programs,)](
            grad, x, weight, grad_x, sums, rows, x.shape[-1], steps, eps,
            NEED_X=need_x, NEED_WEIGHT=need_weight, **options,
        )  # fmt: skip
    return grad_x, sums.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)


def _shape(x: Tensor, kernel: str) -> tuple[int, dict]:
    """The number of rows, and a tile's constants."""
    width, sizes = x.shape[-1], constants(kernel, x.device, TILE=_TILE, OF_WARP=_OF_WARP)
    block = max(16, triton.next_power_of_2(width))
    return x.numel() // width, {
        "ROWS": max(1, sizes["TILE"] // block),
        "BLOCK": block,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": min(16, max(4, block // sizes["OF_WARP"])),
        "enable_fp_fusion": True,
    }
