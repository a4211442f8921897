"""Hierarchical advantage estimation (HiPER, arXiv 2602.16165): credit on two time scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import FLOATS, check_cu, check_vector, make_plain, widen
from hiper_fast.ops._numbers import check_fraction
from hiper_fast.ops.reference import HAE


def _check(
    rewards, values_low, values_high, values_switch, switch, terminated, cu_turns, bootstrap_low, bootstrap_high,
    gamma, lambda_turn, lambda_segment,
):  # fmt: skip
    check_vector("rewards", rewards, None, FLOATS, None)
    turns, device, dtype = rewards.shape[0], rewards.device, (rewards.dtype,)
    check_vector("values_low", values_low, turns, dtype, device)
    check_vector("values_high", values_high, turns, dtype, device)
    check_vector("switch", switch, turns, (torch.bool,), device)
    trajectories = check_cu("cu_turns", cu_turns, device)
    check_vector("terminated", terminated, trajectories, (torch.bool,), device)
    if values_switch is not None:
        check_vector("values_switch", values_switch, turns, dtype, device)
    if bootstrap_low is not None:
        check_vector("bootstrap_low", bootstrap_low, trajectories, dtype, device)
    if bootstrap_high is not None:
        check_vector("bootstrap_high", bootstrap_high, trajectories, dtype, device)
    check_fraction("gamma", gamma)
    check_fraction("lambda_turn", lambda_turn)
    check_fraction("lambda_segment", lambda_segment)


def _run_reference(
    rewards, values_low, values_high, values_switch, switch, terminated, cu_turns,
    bootstrap_low, bootstrap_high, gamma, lambda_turn, lambda_segment,
):  # fmt: skip
    _library.check_prefix_sum("cu_turns", cu_turns, rewards.shape[0])
    *levels, boundary = reference.hae(
        make_plain(rewards), values_low, values_high, switch, terminated, cu_turns, values_switch=values_switch,
        bootstrap_low=bootstrap_low, bootstrap_high=bootstrap_high,
        gamma=gamma, lambda_turn=lambda_turn, lambda_segment=lambda_segment,
    )  # fmt: skip
    return torch.stack(levels), boundary


def _fake(rewards, values_low, values_high, values_switch, switch, *_):
    levels = rewards.new_empty(
        len(HAE._fields) - 1, rewards.shape[0], dtype=widen(rewards.dtype)
    )  # [6, turns]
    return levels, switch.new_empty(switch.shape)


_op = _library.define(
    "hae(Tensor rewards, Tensor values_low, Tensor values_high, Tensor? values_switch, Tensor switch, "
    "Tensor terminated, Tensor cu_turns, Tensor? bootstrap_low, Tensor? bootstrap_high, "
    "float gamma, float lambda_turn, float lambda_segment) -> (Tensor, Tensor)",
    check=_check,
    plain=_run_reference,
    fake=_fake,
)


def hae(
    rewards: Tensor,
    values_low: Tensor,
    values_high: Tensor,
    switch: Tensor,
    terminated: Tensor,
    cu_turns: Tensor,
    *,
    values_switch: Tensor | None = None,
    bootstrap_low: Tensor | None = None,
    bootstrap_high: Tensor | None = None,
    gamma: float = 1.0,
    lambda_turn: float = 1.0,
    lambda_segment: float = 0.95,
) -> HAE:
    """Hierarchical advantages and returns of packed trajectories.

    A segment begins at a trajectory's first turn and at every turn with `switch`. With b_k, e_k,
    d_k the first turn, last turn and length of segment k:

        low     delta_t = r_t + gamma v' - V_low(t),
                v' = V_low(t+1), or V_high(t+1) at a segment's last turn
                A_low(t) = delta_t + gamma lambda_turn A_low(t+1), inside the segment only
        high    delta_k = sum_j gamma^j r_{b_k+j} + gamma^{d_k} V_high(b_{k+1}) - V_high(b_k)
                A_high(b_k) = delta_k + gamma^{d_k} lambda_segment A_high(b_{k+1})
        switch  G_t = r_t + gamma G_{t+1}, past a segment's end V_high(b_{k+1})
                A_switch(t) = G_t - V_switch(t)

    Past a trajectory's last turn stands 0 if it terminated, else its bootstrap value.

    Args:
        rewards: [turns] float32, float64, bfloat16 or float16, shaping included.
        values_low, values_high: [turns], same dtype; values_high is read at boundary turns only.
        switch: bool [turns]; whether turn 0 switches makes no difference.
        terminated: bool [trajectories], True where the environment ended the episode (a limit did not).
        cu_turns: int32 [trajectories + 1], exclusive prefix sum of the turns of each trajectory.
        values_switch: [turns], None means 0.
        bootstrap_low, bootstrap_high: [trajectories], values after the last turn; None means 0.
        gamma, lambda_turn, lambda_segment: in [0, 1].

    Returns:
        HAE of float32 or (for float64) float64, detached from autograd.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.

    Example:
        >>> one = lambda *x: torch.tensor(x)
        >>> result = hae(one(0.0, 0.0, 1.0), one(0.1, 0.2, 0.3), one(0.5, 0.0, 0.6), one(True, False, True),
        ...              one(True), torch.tensor([0, 3], dtype=torch.int32), lambda_segment=1.0)
        >>> result.advantages_low, result.advantages_high
        (tensor([0.5000, 0.4000, 0.7000]), tensor([0.5000, 0.0000, 0.4000]))
    """
    levels, boundary = _op(
        rewards, values_low, values_high, values_switch, switch, terminated, cu_turns,
        bootstrap_low, bootstrap_high, gamma, lambda_turn, lambda_segment,
    )  # fmt: skip
    return HAE(*levels.unbind(0), boundary)
