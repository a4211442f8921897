"""Mean and deviations of masked values in parts that can be merged (after Chan, Golub, LeVeque 1979).

A part is (count, mean, residual, squares): its mean, rounded, the sum of the deviations from that, which is what the
rounding left, and the sum of their squares. Deviations are small where values are not, so that the values' own dtype
holds all of it: float32 needs no float64, of which consumer cards have a 64th of the rate. Squares of float32 overflow
from deviations of 1e19 on.

Tiles are of levels, which have moments of their own, by values or parts. Parts are merged in the order of their
indices, so a result never changes from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS = tl.constexpr(256)  # all of them are read by every program that needs their pool
_LEAST = tl.constexpr(1e-30)  # eps; a much smaller one is 0 in float32


@triton.jit
def _sums(a, b):
    """Of both over axis 1, at once."""
    return tl.split(tl.sum(tl.join(a, b), axis=1))


@triton.jit
def moments(values, mask):
    ones = tl.where(mask, tl.full([], 1.0, values.dtype), 0.0)
    count, total = _sums(ones, tl.where(mask, values, 0.0))
    mean = total / tl.maximum(count, 1.0)
    deviation = tl.where(mask, values - mean[:, None], 0.0)
    residual, squares = _sums(deviation, deviation * deviation)
    return count, mean, residual, squares


@triton.jit
def about(point, count, mean, residual, squares):
    """(residual, squares) of a part about a point instead of its mean."""
    step = mean - point
    moved = count * step
    return residual + moved, squares + step * (residual + residual + moved)


@triton.jit
def merge(count, mean, residual, squares, more_count, more_mean, more_residual, more_squares):
    """The moments of two parts together; associative up to rounding."""
    total = count + more_count
    middle = (count * mean + more_count * more_mean) / (total + (total == 0))
    residual, squares = about(middle, count, mean, residual, squares)
    more_residual, more_squares = about(middle, more_count, more_mean, more_residual, more_squares)
    return total, middle, residual + more_residual, squares + more_squares


@triton.jit
def store_part(parts, index, count, mean, residual, squares, LEVELS: tl.constexpr):
    place = (index * LEVELS + tl.arange(0, LEVELS))[:, None] * 4 + tl.arange(0, 4)[None, :]
    part = tl.join(tl.join(count, residual), tl.join(mean, squares))
    tl.store(parts + place, tl.reshape(part, [LEVELS, 4]))


@triton.jit
def _load_parts(parts, number, LEVELS: tl.constexpr):
    """(count, mean, residual, squares), each [levels, parts], of the first `number` parts, the others empty."""
    index = tl.arange(0, MOST_PARTS)[None, :]
    place = index * LEVELS + tl.arange(0, LEVELS)[:, None]
    place = place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    part = tl.load(parts + place, mask=(index < number)[:, :, None], other=0.0)
    pairs = tl.split(tl.reshape(part, [LEVELS, MOST_PARTS, 2, 2]))
    count, residual = tl.split(pairs[0])
    mean, squares = tl.split(pairs[1])
    return count, mean, residual, squares


@triton.jit
def pooled(parts, number, eps, LEVELS: tl.constexpr):
    """Of each level (mean, what its rounding left, 1 / (std + eps)), from the first `number` parts."""
    count, mean, residual, squares = _load_parts(parts, number, LEVELS)
    total, weighted = _sums(count, count * mean)
    total = tl.maximum(total, 1.0)
    middle = weighted / total
    residual, squares = about(middle[:, None], count, mean, residual, squares)
    residual, squares = _sums(residual, squares)
    rest = residual / total
    variance = tl.maximum(squares / total - rest * rest, 0.0)
    least = tl.maximum(tl.full([], eps, variance.dtype), _LEAST)
    return middle, rest, 1.0 / (tl.sqrt(variance) + least)


def new_parts(like: Tensor, levels: int) -> Tensor:
    return like.new_empty(MOST_PARTS.value, levels, 4)
