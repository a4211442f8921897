"""A token drawn of each row of logits, in two launches.

    blocks of the vocabulary  --parts-->  per row and block its peak and sum of exp((logit - peak) / temperature)
    per row                   --draw-->   the block in which the draw lies, and the token in that block

So the logits are read once, and of each row one block again. Sums of blocks are pooled in float64. Where a row begins
tells how its blocks are read, but not where they begin: the same row is drawn alike wherever it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._vectors import are_aligned, read

_BLOCK = 4096  # logits
_LEAST_PARTS = 128  # that the second kernel is built for: vocabularies up to 524,288
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)  # above 0


@triton.jit
def _block(row, block, vocabulary, aligned, BLOCK: tl.constexpr):
    """Of a row the logits of a block, minus infinity past its end."""
    start = block * BLOCK
    whole = (aligned != 0) & (start + BLOCK <= vocabulary)
    column = start + tl.arange(0, BLOCK)
    return read(row, column, vocabulary, whole, other=float("-inf")).to(tl.float32)


@triton.jit
def _sharpness(temperatures, row, flags, SLOT: tl.constexpr):
    """1 / temperature, 1 where it is greedy or not at least 0 and finite; and whether it is greedy."""
    temperature = tl.load(temperatures + row)
    fits = (temperature >= 0) & (temperature < float("inf"))
    tl.store(flags + SLOT, 1, mask=fits == 0)
    divisor = tl.where(fits & (temperature > 0), temperature, 1.0)
    # No infinity is multiplied by 0, nor 0 by infinity.
    return tl.minimum(tl.maximum(1.0 / divisor, _LEAST), -_LOWEST), temperature == 0


@triton.jit(
    do_not_specialize=["vocabulary", "pitch", "aligned", "blocks"],
    do_not_specialize_on_alignment=["logits", "temperatures", "peaks", "sums", "flags"],
)
def _parts_kernel(
    logits, temperatures, peaks, sums, flags, vocabulary, pitch, aligned, blocks,
    SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * pitch
    sharpness, _ = _sharpness(temperatures, row, flags, SLOT)
    x = _block(logits, block, vocabulary, aligned, BLOCK)
    peak = tl.maximum(tl.max(x, axis=0), _LOWEST)  # no infinity is subtracted from another
    place = row.to(tl.int64) * blocks + block
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(tl.exp((x - peak) * sharpness), axis=0))


@triton.jit
def _find(weights, target, SIZE: tl.constexpr):
    """Where the weights' sum first exceeds `target`; where rounding keeps it below, the last place of any weight."""
    place = tl.arange(0, SIZE)
    above = (tl.cumsum(weights, axis=0) > target) & (weights > 0)
    first = tl.min(tl.where(above, place, SIZE), axis=0)
    last = tl.max(tl.where(weights > 0, place, 0), axis=0)
    return tl.where(first < SIZE, first, last)


@triton.jit(
    do_not_specialize=["vocabulary", "pitch", "aligned", "blocks"],
    do_not_specialize_on_alignment=["logits", "uniforms", "temperatures", "peaks", "sums", "flags"],
)
def _draw_kernel(
    logits, uniforms, temperatures, peaks, sums, tokens, logprobs, flags, vocabulary, pitch, aligned, blocks,
    UNIFORM_SLOT: tl.constexpr, TEMPERATURE_SLOT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * pitch
    sharpness, greedy = _sharpness(temperatures, row, flags, TEMPERATURE_SLOT)
    uniform = tl.load(uniforms + row)
    fits = (uniform >= 0) & (uniform < 1)
    tl.store(flags + UNIFORM_SLOT, 1, mask=fits == 0)
    uniform = tl.where(fits & (greedy == 0), uniform, 0.0)

    part = tl.arange(0, PARTS)
    place = row.to(tl.int64) * blocks + part
    peak = tl.load(peaks + place, mask=part < blocks, other=_LOWEST)
    weight = tl.load(sums + place, mask=part < blocks, other=0.0)
    top = tl.max(peak, axis=0)
    # Greedy is the first number's draw where only the largest logits weigh anything.
    share = (weight * tl.exp((peak - top) * sharpness)).to(tl.float64)
    total = tl.sum(share, axis=0)
    share = tl.where(greedy, ((peak == top) & (weight > 0)).to(tl.float64), share)
    target = uniform * tl.sum(share, axis=0)
    block = _find(share, target, PARTS)
    before = tl.sum(tl.where(part < block, share, 0.0), axis=0)
    inside = (target - before) / tl.sum(tl.where(part == block, share, 0.0), axis=0)

    x = _block(logits, block, vocabulary, aligned, BLOCK)
    peak = tl.sum(tl.where(part == block, peak, 0.0), axis=0)
    weight = tl.exp((x - peak) * sharpness).to(tl.float64)
    weight = tl.where(greedy, (x == top).to(tl.float64), weight)
    token = block * BLOCK + _find(weight, inside * tl.sum(weight, axis=0), BLOCK)
    token = tl.where(total > 0, token, 0)
    chosen = tl.load(logits + token).to(tl.float32)
    logprob = (chosen - top) * sharpness - tl.log(total.to(tl.float32))
    logprob = tl.where(total > 0, tl.minimum(logprob, 0.0), float("nan"))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs = temperature.new_empty(rows)
    if not rows:
        return tokens, logprobs
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    uniform, temperature = uniform.contiguous(), temperature.contiguous()
    blocks = triton.cdiv(vocabulary, _BLOCK)
    peaks, sums = temperature.new_empty(2, rows, blocks).unbind(0)
    pitch = logits.stride(0)
    aligned = are_aligned(logits) if pitch * logits.element_size() % 16 == 0 else 0
    row = vocabulary, pitch, aligned, blocks
    with on_device(logits):
        _parts_kernel[(rows, blocks)](
            logits, temperature, peaks, sums, _errors.flags(), *row,
            SLOT=_errors.SAMPLE_TEMPERATURE, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        _draw_kernel[(rows,)](
            logits, uniform, temperature, peaks, sums, tokens, logprobs, _errors.flags(), *row,
            UNIFORM_SLOT=_errors.SAMPLE_UNIFORM, TEMPERATURE_SLOT=_errors.SAMPLE_TEMPERATURE,
            BLOCK=_BLOCK, PARTS=max(_LEAST_PARTS, triton.next_power_of_2(blocks)), num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return tokens, logprobs
