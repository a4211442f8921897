"""Mean and squared deviations of masked values, in parts that can be merged (Chan, Golub, LeVeque 1979).

Parts are (count, mean, squares), squares the sum of squared deviations from the part's own mean, in float64. They are
merged in the order of their indices, so a result never changes from run to run.
"""

import triton
import triton.language as tl


@triton.jit
def moments(values, mask):
    count = tl.sum(tl.where(mask, 1.0, 0.0).to(tl.float64))
    mean = tl.sum(tl.where(mask, values, 0.0)) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, values - mean, 0.0)
    return count, mean, tl.sum(deviation * deviation)


@triton.jit
def merge(count, mean, squares, more_count, more_mean, more_squares):
    """The moments of two parts together; associative up to rounding."""
    total = count + more_count
    share = more_count / (total + (total == 0))
    step = more_mean - mean
    return total, mean + step * share, squares + more_squares + step * step * count * share


@triton.jit
def pooled(parts, part_stride, number, eps: tl.float64, BLOCK: tl.constexpr):
    """(mean, 1 / (std + eps)) of all parts: `number` <= BLOCK columns of three rows, count, mean and squares."""
    column = tl.arange(0, BLOCK)
    there = column < number
    count = tl.load(parts + column, mask=there, other=0.0)
    mean = tl.load(parts + part_stride + column, mask=there, other=0.0)
    squares = tl.load(parts + 2 * part_stride + column, mask=there, other=0.0)
    total = tl.maximum(tl.sum(count), 1.0)
    grand = tl.sum(count * mean) / total
    deviation = mean - grand
    variance = (tl.sum(squares) + tl.sum(count * deviation * deviation)) / total
    return grand, 1.0 / (tl.sqrt(variance) + eps)


@triton.jit
def store_part(parts, part_stride, index, count, mean, squares):
    tl.store(parts + index, count)
    tl.store(parts + part_stride + index, mean)
    tl.store(parts + 2 * part_stride + index, squares)


MOST_PARTS = 1024


def part_block(parts: int) -> int:
    """BLOCK of `pooled` for so many parts."""
    return 256 if parts <= 256 else MOST_PARTS
