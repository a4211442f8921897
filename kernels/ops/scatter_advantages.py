"""From turns to tokens, alone in one launch, or together with the normalisation of all three levels in two.

    advantage(token) = [action] A_low + [subgoal, boundary turn] A_high + [switch] A_switch

A tile is TURNS turns by TOKENS tokens and goes along its turns' tokens. To normalise, the first launch finds which
turns carry which role and the moments of each level over those; the second pools the moments, in every program alike.
What the moments are of is a tile of levels by turns, whose fourth row is empty.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import buffer, on_device
from hiper_fast.kernels._moments import (
    MOST_PARTS,
    merge,
    moments,
    new_parts,
    pooled,
    store_part,
)
from hiper_fast.kernels._scan import bounds
from hiper_fast.kernels._tuning import constants

_ACTION, _SUBGOAL, _SWITCH = (tl.constexpr(bit) for bit in (1, 2, 4))  # 1 << level
_LEVELS = tl.constexpr(4)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _training(opens):
    """The roles that train at a turn: the subgoal only where one is named, at a segment's first."""
    return tl.where(opens, _ACTION + _SUBGOAL + _SWITCH, _ACTION + _SWITCH)


@triton.jit
def _load_levels(low, high, switch, turn, carried):
    """[levels, turns] and whether the turn carries the level, whose values elsewhere are not read."""
    level = tl.arange(0, _LEVELS)[:, None]
    first = tl.where(level == 0, low, tl.where(level == 1, high, switch))
    chosen = ((carried[None, :] >> level) & 1) != 0
    return tl.load(first + turn[None, :], mask=chosen, other=0.0), chosen


@triton.jit
def _carried(roles, begin, end, TURNS: tl.constexpr, TOKENS: tl.constexpr):
    """The roles of each turn's tokens, together."""
    found = tl.zeros([TURNS, TOKENS], tl.int32)
    longest = tl.max(end - begin, axis=0)
    start = 0
    while start < longest:
        token = begin[:, None] + start + tl.arange(0, TOKENS)[None, :]
        found |= tl.load(roles + token, mask=token < end[:, None], other=0).to(tl.int32)
        start += TOKENS
    return tl.reduce(found, 1, _either)


@triton.jit(
    do_not_specialize=["tokens", "turns", "steps"],
    do_not_specialize_on_alignment=["low", "high", "switch", "boundary", "roles", "cu_tokens", "trained"],
)  # fmt: skip
def _moments_kernel(
    low, high, switch, boundary, roles, cu_tokens, parts, trained, flags, tokens, turns, steps,
    SLOT: tl.constexpr, TURNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    nothing = tl.zeros([_LEVELS], low.dtype.element_ty)
    count, mean, residual, squares = nothing, nothing, nothing, nothing
    for step in range(0, steps):
        turn = (program * steps + step) * TURNS + tl.arange(0, TURNS)
        there = turn < turns
        begin, end = bounds(cu_tokens, turn, turns, tokens, flags, SLOT)
        opens = tl.load(boundary + turn, mask=there, other=0) != 0
        carried = _carried(roles, begin, end, TURNS, TOKENS) & _training(opens)
        tl.store(trained + turn, carried.to(tl.uint8), mask=there)
        levels, chosen = _load_levels(low, high, switch, turn, carried)
        more_count, more_mean, more_residual, more_squares = moments(levels, chosen)
        count, mean, residual, squares = merge(
            count, mean, residual, squares, more_count, more_mean, more_residual, more_squares
        )
    store_part(parts, program, count, mean, residual, squares, _LEVELS)


@triton.jit
def _standardise(x, carried, level: tl.constexpr, mean, rest, scale):
    """The level's values by its own of [levels] moments, 0 at turns that do not carry it."""
    own = tl.arange(0, _LEVELS) == level
    mean = tl.sum(tl.where(own, mean, 0.0), axis=0)
    rest = tl.sum(tl.where(own, rest, 0.0), axis=0)
    scale = tl.sum(tl.where(own, scale, 0.0), axis=0)
    return tl.where((carried & (1 << level)) != 0, (x - mean - rest) * scale, 0.0)


@triton.jit(
    do_not_specialize=["tokens", "turns", "number"],
    do_not_specialize_on_alignment=["low", "high", "switch", "boundary", "roles", "cu_tokens", "trained"],
)  # fmt: skip
def _scatter_kernel(
    low, high, switch, boundary, roles, cu_tokens, parts, trained, advantages, loss_mask, levels, flags,
    tokens, turns, number, eps: tl.float64,
    SLOT: tl.constexpr, NORMALIZE: tl.constexpr, TURNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    if NORMALIZE:
        mean, rest, scale = pooled(parts, number, eps, _LEVELS)
    turn = tl.program_id(0) * TURNS + tl.arange(0, TURNS)
    there = turn < turns
    begin, end = bounds(cu_tokens, turn, turns, tokens, flags, SLOT)
    opens = tl.load(boundary + turn, mask=there, other=0) != 0
    a_low = tl.load(low + turn, mask=there, other=0.0)
    a_high = tl.load(high + turn, mask=there, other=0.0)
    a_switch = tl.load(switch + turn, mask=there, other=0.0)
    if NORMALIZE:
        carried = tl.load(trained + turn, mask=there, other=0).to(tl.int32)
        a_low = _standardise(a_low, carried, 0, mean, rest, scale)
        a_high = _standardise(a_high, carried, 1, mean, rest, scale)
        a_switch = _standardise(a_switch, carried, 2, mean, rest, scale)
        tl.store(levels + turn, a_low, mask=there)
        tl.store(levels + turns + turn, a_high, mask=there)
        tl.store(levels + 2 * turns + turn, a_switch, mask=there)
    training = _training(opens)[:, None]
    longest = tl.max(end - begin, axis=0)
    start = 0
    while start < longest:
        token = begin[:, None] + start + tl.arange(0, TOKENS)[None, :]
        inside = token < end[:, None]
        role = tl.load(roles + token, mask=inside, other=0).to(tl.int32) & training
        advantage = tl.where((role & _ACTION) != 0, a_low[:, None], 0.0)
        advantage += tl.where((role & _SUBGOAL) != 0, a_high[:, None], 0.0)
        advantage += tl.where((role & _SWITCH) != 0, a_switch[:, None], 0.0)
        tl.store(advantages + token, advantage, mask=inside)
        tl.store(loss_mask + token, role != 0, mask=inside)
        start += TOKENS


def _scatter(given, parts, trained, levels, number, eps):
    low, boundary, roles = given[0], given[3], given[4]
    turns, tokens = boundary.shape[0], roles.shape[0]
    advantages = low.new_empty(tokens)
    loss_mask = torch.empty(tokens, dtype=torch.bool, device=roles.device)
    tile = constants(
        "scatter_advantages._scatter_kernel", low.device, TURNS=8, TOKENS=128, num_warps=4
    )
    if turns:
        with on_device(low):
            _scatter_kernel[(triton.cdiv(turns, tile["TURNS"]),)](
                *given, parts, trained, advantages, loss_mask, levels, _errors.flags(), tokens, turns, number, eps,
                SLOT=_errors.SCATTER_TOKENS, NORMALIZE=parts is not None, **tile,
                enable_fp_fusion=True,
            )  # fmt: skip
    return advantages, loss_mask


def scatter_advantages(
    advantages_low: Tensor, advantages_high: Tensor, advantages_switch: Tensor, boundary: Tensor, roles: Tensor,
    cu_tokens: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    levels = buffer(advantages_low), buffer(advantages_high), buffer(advantages_switch)
    given = *levels, boundary.contiguous(), roles.contiguous(), cu_tokens.contiguous()
    return _scatter(given, None, None, None, 0, 0.0)


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
    given = low, high, switch, boundary, roles, cu_tokens
    turns, tokens = boundary.shape[0], roles.shape[0]
    levels, trained = low.new_empty(3, turns), roles.new_empty(turns)
    parts = new_parts(low, _LEVELS.value)
    tile = constants(
        "scatter_advantages._moments_kernel", low.device, TURNS=32, TOKENS=128, num_warps=4
    )
    steps = triton.cdiv(turns, tile["TURNS"] * MOST_PARTS.value)
    number = triton.cdiv(turns, tile["TURNS"] * max(1, steps))
    if turns:
        with on_device(low):
            _moments_kernel[(number,)](
                *given, parts, trained, _errors.flags(), tokens, turns, steps,
                SLOT=_errors.SCATTER_TOKENS, **tile, enable_fp_fusion=True,
            )  # fmt: skip
    return *_scatter(given, parts, trained, levels, number, eps), levels
