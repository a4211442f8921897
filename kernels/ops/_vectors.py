"""Vectors in blocks: 16 bytes an access where a block is whole and they all begin at a multiple of 16 bytes.

The kernel asks whether that is so. As a property of a pointer, which Triton compiles for, it would be found out, and
compiled for, in the middle of a run.
"""

import triton
import triton.language as tl
from torch import Tensor


def are_aligned(*vectors: Tensor | None) -> int:
    """1 where all begin at a multiple of 16 bytes, else 0."""
    return int(all(vector is None or vector.data_ptr() % 16 == 0 for vector in vectors))


@triton.jit
def read(vector, t, size, whole, other: tl.constexpr = 0):
    """vector[t], `other` past its size; `whole`: all of the block lies in the vector, which is aligned."""
    if whole:
        x = tl.load(tl.multiple_of(vector + t, 16))
    else:
        x = tl.load(vector + t, mask=t < size, other=other)
    return x


@triton.jit
def write(vector, t, x, size, whole):
    if whole:
        tl.store(tl.multiple_of(vector + t, 16), x)
    else:
        tl.store(vector + t, x, mask=t < size)
