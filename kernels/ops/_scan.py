"""What the scans over packed trajectories share.

A tile holds ROWS trajectories and goes through their turns in blocks of BLOCK, from the last turn to the first. Column
j of block c of a trajectory is its turn `end - 1 - c * BLOCK - j`: time runs backwards, so an ordinary forward scan
over the columns is the recurrence, and what the last column holds is carried into the next block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._tuning import constants

SHAPES = (1, 64), (1, 256), (1, 1024), (4, 64)  # of tiles: ROWS, BLOCK
_compiled: set[tuple[str, torch.device, torch.dtype]] = set()  # kernels all of whose shapes are


@triton.jit
def compose(later_factor, later_offset, factor, offset):
    """The affine map x -> later_factor x + later_offset, then x -> factor x + offset, as one; associative."""
    return factor * later_factor, factor * later_offset + offset


@triton.jit
def scan(factor, offset, carried):
    """y_j = factor_j y_{j-1} + offset_j along the columns, where `carried`, one per row, stands before the first."""
    factor, offset = tl.associative_scan((factor, offset), 1, compose)
    return factor * carried[:, None] + offset


@triton.jit
def last_column(x, column, BLOCK: tl.constexpr):
    return tl.sum(tl.where(column == BLOCK - 1, x, 0.0), axis=1)


@triton.jit
def bounds(cu, row, rows, total, flags, SLOT: tl.constexpr):
    """[begin, end) of each row, empty for rows past the last and within [0, total) whatever cu holds."""
    exists = row < rows
    begin = tl.load(cu + row, mask=exists, other=0)
    end = tl.load(cu + row + 1, mask=exists, other=0)
    bad = (begin < 0) | (end < begin) | (end > total)
    bad |= exists & (((row == 0) & (begin != 0)) | ((row == rows - 1) & (end != total)))
    tl.store(flags + SLOT + tl.zeros_like(row), 1, mask=bad)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total)


@triton.jit
def trajectory(cu_turns, terminated, row, trajectories, turns, flags, SLOT: tl.constexpr):
    """`bounds` of each row's turns, and whether it has some and did not terminate."""
    begin, end = bounds(cu_turns, row, trajectories, turns, flags, SLOT)
    exists = begin < end
    return begin, end, exists & (tl.load(terminated + row, mask=exists, other=1) == 0)


@triton.jit
def final_value(bootstrap, row, alive, count):
    """What stands past a trajectory's last turn: 0 or the bootstrap, of which there are 0 or one for each row."""
    return tl.load(bootstrap + row, mask=alive & (row < count), other=0.0).to(tl.float64)


@triton.jit
def block_of_turns(begin, end, start, column):
    """The turns in the columns of the block `start` turns before the end: which they are, are there, are the last."""
    t = end[:, None] - 1 - start - column
    return t, t >= begin[:, None], t == end[:, None] - 1


def choose_shape(turns: int, trajectories: int) -> tuple[int, int]:
    """A tile's (ROWS, BLOCK), by what the host knows: the mean length, and whether rows outnumber processors."""
    mean = turns / trajectories
    block = 64 if mean <= 64 else 256 if mean <= 256 else 1024
    return 4 if trajectories > 1024 and block == 64 else 1, block


def launch(
    kernel, name: str, floats: Tensor, trajectories: int, arguments: tuple, **options
) -> None:
    """A program for each tile of trajectories, on the device of `floats` [turns] and compiled for their dtype."""
    rows, block = choose_shape(floats.shape[0], trajectories)
    with on_device(floats):
        _compile_shapes(kernel, name, floats, arguments, options)
        tile = _tile(name, floats.device, rows, block)
        kernel[(triton.cdiv(trajectories, rows),)](*arguments, **tile, **options)


def _compile_shapes(kernel, name: str, floats: Tensor, arguments: tuple, options: dict) -> None:
    """All shapes at the first launch, running none: later ones would compile theirs in the middle of a run."""
    key = name, floats.device, floats.dtype
    if key not in _compiled:
        for shape in SHAPES:
            kernel.warmup(*arguments, grid=(1,), **_tile(name, floats.device, *shape), **options)
        _compiled.add(key)


def _tile(name: str, device: torch.device, rows: int, block: int) -> dict[str, int]:
    warps = max(1, rows * block // 128)
    measured = constants(f"{name} {rows} x {block}", device, num_warps=warps)
    return {"ROWS": rows, "BLOCK": block, **measured}
