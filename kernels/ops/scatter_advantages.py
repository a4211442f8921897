"""From turns to tokens, alone in one launch, or together with the normalisation of all three levels in two.

    advantage(token) = [action] A_low + [subgoal, boundary turn] A_high + [switch] A_switch

A tile is TURNS turns by TOKENS tokens and goes along its turns' tokens. To normalise, the first launch finds which
turns carry which role and the moments of each level over those; the second pools the moments, in every program alike.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._moments import MOST_PARTS, merge, moments, part_block, pooled, store_part
from hiper_fast.kernels._scan import bounds

_ACTION, _SUBGOAL, _SWITCH = (tl.constexpr(bit) for bit in (1, 2, 4))
_TOKENS = 128
_TURNS = 16  # of a tile that scatters
_MOMENT_TURNS = (
    32  # of one that finds moments: all of them are read again by every tile that scatters
)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _training(opens):
    """The roles that train at a turn: the subgoal only where one is named, at a segment's first."""
    return tl.where(opens, _ACTION + _SUBGOAL + _SWITCH, _ACTION + _SWITCH)


@triton.jit
def _moment(level, turn, chosen):
    return moments(tl.load(level + turn, mask=chosen, other=0.0).to(tl.float64), chosen)


@triton.jit(do_not_specialize=["tokens", "turns", "steps"])
def _moments_kernel(
    low, high, switch, boundary, roles, cu_tokens, parts, trained, flags, tokens, turns, steps,
    SLOT: tl.constexpr, TURNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    zero = tl.full([], 0.0, tl.float64)
    low_count, low_mean, low_squares = zero, zero, zero
    high_count, high_mean, high_squares = zero, zero, zero
    switch_count, switch_mean, switch_squares = zero, zero, zero
    for step in range(0, steps):
        turn = (program * steps + step) * TURNS + tl.arange(0, TURNS)
        begin, end = bounds(cu_tokens, turn, turns, tokens, flags, SLOT)
        carried = tl.zeros([TURNS], tl.int32)
        longest = tl.max(end - begin, axis=0)
        start = 0
        while start < longest:
            token = begin[:, None] + start + tl.arange(0, TOKENS)[None, :]
            role = tl.load(roles + token, mask=token < end[:, None], other=0).to(tl.int32)
            carried |= tl.reduce(role, 1, _either)
            start += TOKENS
        opens = tl.load(boundary + turn, mask=turn < turns, other=0) != 0
        carried &= _training(opens)
        tl.store(trained + turn, carried.to(tl.uint8), mask=turn < turns)
        count, mean, squares = _moment(low, turn, (carried & _ACTION) != 0)
        low_count, low_mean, low_squares = merge(
            low_count, low_mean, low_squares, count, mean, squares
        )
        count, mean, squares = _moment(high, turn, (carried & _SUBGOAL) != 0)
        high_count, high_mean, high_squares = merge(
            high_count, high_mean, high_squares, count, mean, squares
        )
        count, mean, squares = _moment(switch, turn, (carried & _SWITCH) != 0)
        switch_count, switch_mean, switch_squares = merge(
            switch_count, switch_mean, switch_squares, count, mean, squares
        )
    store_part(parts, programs, program, low_count, low_mean, low_squares)
    store_part(parts + 3 * programs, programs, program, high_count, high_mean, high_squares)
    store_part(parts + 6 * programs, programs, program, switch_count, switch_mean, switch_squares)


@triton.jit
def _level(
    level,
    turn,
    there,
    parts,
    number,
    eps,
    dtype: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    x = tl.load(level + turn, mask=there, other=0.0)
    if NORMALIZE:
        mean, scale = pooled(parts, number, number, eps, PARTS)
        x = (x.to(tl.float64) - mean) * scale
    return x.to(dtype)


@triton.jit(do_not_specialize=["tokens", "turns", "number"])
def _scatter_kernel(
    low, high, switch, boundary, roles, cu_tokens, parts, trained, advantages, loss_mask, levels, flags,
    tokens, turns, number, eps: tl.float64,
    SLOT: tl.constexpr, NORMALIZE: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    turn = tl.program_id(0) * TURNS + tl.arange(0, TURNS)
    there = turn < turns
    begin, end = bounds(cu_tokens, turn, turns, tokens, flags, SLOT)
    opens = tl.load(boundary + turn, mask=there, other=0) != 0
    dtype: tl.constexpr = advantages.dtype.element_ty
    a_low = _level(low, turn, there, parts, number, eps, dtype, NORMALIZE, PARTS)
    a_high = _level(high, turn, there, parts + 3 * number, number, eps, dtype, NORMALIZE, PARTS)
    a_switch = _level(switch, turn, there, parts + 6 * number, number, eps, dtype, NORMALIZE, PARTS)
    if NORMALIZE:
        carried = tl.load(trained + turn, mask=there, other=0).to(tl.int32)
        tl.store(levels + turn, tl.where((carried & _ACTION) != 0, a_low, 0.0), mask=there)
        tl.store(
            levels + turns + turn, tl.where((carried & _SUBGOAL) != 0, a_high, 0.0), mask=there
        )
        tl.store(
            levels + 2 * turns + turn, tl.where((carried & _SWITCH) != 0, a_switch, 0.0), mask=there
        )
    training = _training(opens)
    longest = tl.max(end - begin, axis=0)
    start = 0
    while start < longest:
        token = begin[:, None] + start + tl.arange(0, TOKENS)[None, :]
        inside = token < end[:, None]
        role = tl.load(roles + token, mask=inside, other=0).to(tl.int32) & training[:, None]
        advantage = tl.where((role & _ACTION) != 0, a_low[:, None], 0.0)
        advantage += tl.where((role & _SUBGOAL) != 0, a_high[:, None], 0.0)
        advantage += tl.where((role & _SWITCH) != 0, a_switch[:, None], 0.0)
        tl.store(advantages + token, advantage, mask=inside)
        tl.store(loss_mask + token, role != 0, mask=inside)
        start += TOKENS


def _scatter(low, high, switch, boundary, roles, cu_tokens, parts, trained, levels, eps):
    turns, tokens = boundary.shape[0], roles.shape[0]
    advantages = low.new_empty(tokens)
    loss_mask = torch.empty(tokens, dtype=torch.bool, device=roles.device)
    normalizes = parts is not None
    number = parts.shape[1] if normalizes else 0
    if turns:
        with on_device(low):
            _scatter_kernel[(triton.cdiv(turns, _TURNS),)](
                low, high, switch, boundary, roles, cu_tokens, parts if normalizes else low,
                trained if normalizes else roles, advantages, loss_mask, levels if normalizes else advantages,
                _errors.flags(), tokens, turns, number, eps,
                SLOT=_errors.SCATTER_TOKENS, NORMALIZE=normalizes, PARTS=part_block(number),
                TURNS=_TURNS, TOKENS=_TOKENS, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    return advantages, loss_mask


def scatter_advantages(
    advantages_low: Tensor, advantages_high: Tensor, advantages_switch: Tensor, boundary: Tensor, roles: Tensor,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    levels = buffer(advantages_low), buffer(advantages_high), buffer(advantages_switch)
    return _scatter(
        *levels,
        boundary.contiguous(),
        roles.contiguous(),
        cu_tokens.contiguous(),
        None,
        None,
        None,
        0.0,
    )


def normalize_and_scatter(
    advantages_low: Tensor, advantages_high: Tensor, advantages_switch: Tensor, boundary: Tensor, roles: Tensor,
    cu_tokens: Tensor, eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each level normalised over the turns that train it, then scattered: three `normalize` and `scatter_advantages`.

    A turn trains a level if one of its tokens has the level's role and, for the high level, if it is a boundary.

    Returns:
        advantages [tokens], loss_mask bool [tokens] as of `scatter_advantages`; levels [3, turns], the normalised
        low, high and switch advantages, 0 at turns that do not train the level.
    """
    low, high, switch = buffer(advantages_low), buffer(advantages_high), buffer(advantages_switch)
    boundary, roles, cu_tokens = boundary.contiguous(), roles.contiguous(), cu_tokens.contiguous()
    turns, tokens = boundary.shape[0], roles.shape[0]
    levels = low.new_empty(3, turns)
    steps = max(1, triton.cdiv(turns, _MOMENT_TURNS * MOST_PARTS))
    parts = low.new_empty(9, triton.cdiv(turns, _MOMENT_TURNS * steps), dtype=torch.float64)
    trained = roles.new_empty(turns)
    if turns:
        with on_device(low):
            _moments_kernel[(parts.shape[1],)](
                low, high, switch, boundary, roles, cu_tokens, parts, trained, _errors.flags(), tokens, turns, steps,
                SLOT=_errors.SCATTER_TOKENS, TURNS=_MOMENT_TURNS, TOKENS=_TOKENS,
                num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    return *_scatter(
        low, high, switch, boundary, roles, cu_tokens, parts, trained, levels, eps
    ), levels
