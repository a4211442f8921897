"""Generalised advantage estimation over packed trajectories, one launch.

    A_t = r_t + gamma V(t+1) - V(t) + gamma lambda A_{t+1},   returns = A + V

The recurrence is a scan of affine maps A -> gamma lambda A + delta_t; see _scan.py for the tiles.
"""

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
    do_not_specialize=["turns", "trajectories", "final_values"],
    do_not_specialize_on_alignment=["rewards", "values", "terminated", "cu_turns", "bootstrap"],
)
def _kernel(
    rewards, values, terminated, cu_turns, bootstrap, out, flags,
    turns, trajectories, final_values, gamma: tl.float64, decay: tl.float64,
    SLOT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin, end, alive = trajectory(cu_turns, terminated, row, trajectories, turns, flags, SLOT)
    final = final_value(bootstrap, row, alive, final_values)

    column = tl.arange(0, BLOCK)[None, :]
    carried = tl.zeros([ROWS], tl.float64)
    start = 0
    longest = tl.max(end - begin, axis=0)
    while start < longest:
        t, inside, is_last = block_of_turns(begin, end, start, column)
        reward = tl.load(rewards + t, mask=inside, other=0.0).to(tl.float64)
        value = tl.load(values + t, mask=inside, other=0.0).to(tl.float64)
        following = tl.load(values + t + 1, mask=inside & ~is_last, other=0.0).to(tl.float64)
        following = tl.where(is_last, final[:, None], following)

        delta = tl.where(inside, reward + gamma * following - value, 0.0)
        advantage = scan(tl.where(inside, decay, 1.0), delta, carried)
        tl.store(out + t, advantage, mask=inside)
        tl.store(out + turns + t, advantage + value, mask=inside)
        carried = last_column(advantage, column, BLOCK)
        start += BLOCK


def gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, cu_turns: Tensor, bootstrap: Tensor | None,
    gamma: float, lambda_: float,
) -> Tensor:  # fmt: skip
    turns, trajectories = rewards.shape[0], terminated.shape[0]
    rewards, values, bootstrap = buffer(rewards), buffer(values), buffer(bootstrap)
    terminated, cu_turns = terminated.contiguous(), cu_turns.contiguous()
    out = rewards.new_empty(2, turns)
    if trajectories:
        arguments = (
            rewards, values, terminated, cu_turns, values if bootstrap is None else bootstrap, out, _errors.flags(),
            turns, trajectories, 0 if bootstrap is None else trajectories, gamma, gamma * lambda_,
        )  # fmt: skip
        # With the limit named, ptxas does not spill a register or two to fit one program more.
        options = {"SLOT": _errors.GAE_TURNS, "maxnreg": 128, "enable_fp_fusion": True}
        launch(_kernel, "gae._kernel", rewards, trajectories, arguments, **options)
    return out
