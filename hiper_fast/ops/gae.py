"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438), for the flat baselines."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import FLOATS, check_cu, check_vector, make_plain, widen
from hiper_fast.ops._numbers import check_fraction


def _check(rewards, values, terminated, cu_turns, bootstrap, gamma, lambda_):
    check_vector("rewards", rewards, None, FLOATS, None)
    turns, device, dtype = rewards.shape[0], rewards.device, (rewards.dtype,)
    check_vector("values", values, turns, dtype, device)
    trajectories = check_cu("cu_turns", cu_turns, device)
    check_vector("terminated", terminated, trajectories, (torch.bool,), device)
    if bootstrap is not None:
        check_vector("bootstrap", bootstrap, trajectories, dtype, device)
    check_fraction("gamma", gamma)
    check_fraction("lambda_", lambda_)


def _run_reference(rewards, values, terminated, cu_turns, bootstrap, gamma, lambda_):
    _library.check_prefix_sum("cu_turns", cu_turns, rewards.shape[0])
    result = reference.gae(
        make_plain(rewards),
        values,
        terminated,
        cu_turns,
        bootstrap=bootstrap,
        gamma=gamma,
        lambda_=lambda_,
    )
    return torch.stack(result)


_op = _library.define(
    "gae(Tensor rewards, Tensor values, Tensor terminated, Tensor cu_turns, Tensor? bootstrap, "
    "float gamma, float lambda_) -> Tensor",
    check=_check,
    plain=_run_reference,
    fake=lambda rewards, *_: rewards.new_empty(2, rewards.shape[0], dtype=widen(rewards.dtype)),
)


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    cu_turns: Tensor,
    *,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed trajectories.

        A_t = r_t + gamma V(t+1) - V(t) + gamma lambda A_{t+1},   returns = A + V

    Past a trajectory's last turn V is 0 if it terminated, else its bootstrap value.

    Args:
        rewards, values: [turns] float32, float64, bfloat16 or float16, all of one dtype.
        terminated: bool [trajectories].
        cu_turns: int32 [trajectories + 1], exclusive prefix sum of the turns of each trajectory.
        bootstrap: [trajectories], the value of the state after the last turn; None means 0.
        gamma, lambda_: in [0, 1].

    Returns:
        (advantages, returns), each [turns], float32 or (for float64) float64, detached from autograd.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    return _op(rewards, values, terminated, cu_turns, bootstrap, gamma, lambda_).unbind(0)
