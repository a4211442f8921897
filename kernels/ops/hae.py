"""Hierarchical advantage estimation over packed trajectories: all three levels in one launch.

    low     A_low(t) = r_t + gamma v' - V_low(t) + [gamma lambda_turn A_low(t+1) inside the segment]
            v' = V_low(t+1), or V_high(t+1) at a segment's last turn
    switch  G_t = r_t + gamma G_{t+1}, past a segment's end V_high(b_{k+1});   A_switch = G - V_switch
    high    A_high(b_k) = G_{b_k} - V_high(b_k) + gamma^{d_k} lambda_segment A_high(b_{k+1})

All three are scans of affine maps over the turns. The high level walks the same turns: its state is gamma^{b - t}
A_high(b), b the first boundary at or after t, which a turn off the boundary multiplies by gamma and a boundary turn by
gamma lambda_segment, adding its delta. (G at a boundary is the segment's reward plus gamma^{d_k} V_high(b_{k+1}).)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import buffer
from hiper_fast.kernels._scan import (
    block_of_turns,
    final_value,
    last_column,
    launch,
    scan,
    trajectory,
)


@triton.jit(
    do_not_specialize=["turns", "trajectories", "switch_values", "low_values", "high_values"],
    do_not_specialize_on_alignment=[
        "rewards", "values_low", "values_high", "values_switch", "switch", "terminated", "cu_turns",
        "bootstrap_low", "bootstrap_high",
    ],
)  # fmt: skip
def _kernel(
    rewards, values_low, values_high, values_switch, switch, terminated, cu_turns, bootstrap_low, bootstrap_high,
    levels, boundary, flags,
    turns, trajectories, switch_values, low_values, high_values,
    gamma: tl.float64, lambda_turn: tl.float64, lambda_segment: tl.float64,
    SLOT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin, end, alive = trajectory(cu_turns, terminated, row, trajectories, turns, flags, SLOT)
    final_low = final_value(bootstrap_low, row, alive, low_values)
    final_high = final_value(bootstrap_high, row, alive, high_values)

    column = tl.arange(0, BLOCK)[None, :]
    carried_low = tl.zeros([ROWS], tl.float64)
    carried_return = final_high
    carried_high = tl.zeros([ROWS], tl.float64)
    start = 0
    longest = tl.max(end - begin, axis=0)
    while start < longest:
        t, inside, is_last = block_of_turns(begin, end, start, column)
        more = inside & ~is_last
        begins = inside & ((t == begin[:, None]) | (tl.load(switch + t, mask=inside, other=0) != 0))
        # Whether the turn after this one begins a segment. The turn past the trajectory's end counts as one.
        ends = is_last | (tl.load(switch + t + 1, mask=more, other=0) != 0)

        reward = tl.load(rewards + t, mask=inside, other=0.0).to(tl.float64)
        low = tl.load(values_low + t, mask=inside, other=0.0).to(tl.float64)
        next_high = tl.load(values_high + t + 1, mask=more & ends, other=0.0).to(tl.float64)
        next_high = tl.where(is_last, final_high[:, None], next_high)
        next_low = tl.load(values_low + t + 1, mask=more & ~ends, other=0.0).to(tl.float64)
        next_low = tl.where(is_last, final_low[:, None], tl.where(ends, next_high, next_low))

        delta = tl.where(inside, reward + gamma * next_low - low, 0.0)
        kept = tl.where(ends, 0.0, gamma * lambda_turn)
        advantage_low = scan(tl.where(inside, kept, 1.0), delta, carried_low)
        tl.store(levels + t, advantage_low, mask=inside)
        tl.store(levels + turns + t, advantage_low + low, mask=inside)
        carried_low = last_column(advantage_low, column, BLOCK)

        offset = tl.where(inside, reward + tl.where(ends, gamma * next_high, 0.0), 0.0)
        returned = scan(tl.where(inside, tl.where(ends, 0.0, gamma), 1.0), offset, carried_return)
        value_switch = tl.load(values_switch + t, mask=inside & (t < switch_values), other=0.0).to(
            tl.float64
        )
        tl.store(levels + 4 * turns + t, returned - value_switch, mask=inside)
        tl.store(levels + 5 * turns + t, returned, mask=inside)
        carried_return = last_column(returned, column, BLOCK)

        high = tl.load(values_high + t, mask=begins, other=0.0).to(tl.float64)
        gained = tl.where(begins, returned - high, 0.0)
        kept = tl.where(begins, gamma * lambda_segment, gamma)
        advantage_high = scan(tl.where(inside, kept, 1.0), gained, carried_high)
        carried_high = last_column(advantage_high, column, BLOCK)
        advantage_high = tl.where(begins, advantage_high, 0.0)
        tl.store(levels + 2 * turns + t, advantage_high, mask=inside)
        tl.store(levels + 3 * turns + t, advantage_high + high, mask=inside)
        tl.store(boundary + t, begins, mask=inside)
        start += BLOCK


def hae(
    rewards: Tensor, values_low: Tensor, values_high: Tensor, values_switch: Tensor | None, switch: Tensor,
    terminated: Tensor, cu_turns: Tensor, bootstrap_low: Tensor | None, bootstrap_high: Tensor | None,
    gamma: float, lambda_turn: float, lambda_segment: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    turns, trajectories = rewards.shape[0], terminated.shape[0]
    rewards, values_low, values_high = buffer(rewards), buffer(values_low), buffer(values_high)
    switch, terminated, cu_turns = (
        switch.contiguous(),
        terminated.contiguous(),
        cu_turns.contiguous(),
    )
    # What is absent is not read, but a pointer has to be given.
    optional = (values_switch, bootstrap_low, bootstrap_high)
    sizes = [0 if x is None else x.shape[0] for x in optional]
    values_switch, bootstrap_low, bootstrap_high = (
        values_low if x is None else buffer(x) for x in optional
    )
    levels = rewards.new_empty(6, turns)
    boundary = torch.empty_like(switch)
    if trajectories:
        arguments = (
            rewards, values_low, values_high, values_switch, switch, terminated, cu_turns,
            bootstrap_low, bootstrap_high, levels, boundary, _errors.flags(),
            turns, trajectories, *sizes, gamma, lambda_turn, lambda_segment,
        )  # fmt: skip
        options = {"SLOT": _errors.HAE_TURNS, "enable_fp_fusion": True}
        launch(_kernel, "hae._kernel", rewards, trajectories, arguments, **options)
    return levels, boundary
