"""What estimators that compare episodes of one game share."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.estimators import Turns
from hiper_fast.ops import gae, reference

EVERY_ROLE = reference.ACTION | reference.SUBGOAL | reference.SWITCH
EPS = 1e-6  # beside a standard deviation, as verl and TRL have it


def sum_rewards(turns: Turns) -> Tensor:
    """The undiscounted return of each episode, float32 [trajectories]."""
    return torch.zeros(len(turns.group)).index_add(0, find_episodes(turns), turns.rewards)


def discount_rewards(turns: Turns, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, float32 [turns]; nothing stands for what a truncated episode misses."""
    zeros = torch.zeros_like(turns.rewards)
    ended = torch.ones_like(turns.terminated)
    return gae(turns.rewards, zeros, ended, turns.cu_turns, gamma=gamma, lambda_=1.0)[1]


def find_episodes(turns: Turns) -> Tensor:
    """The episode of each turn, int64 [turns]."""
    lengths = turns.cu_turns.diff().long()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def compare(values: Tensor, group: Tensor, *, scaled: bool) -> Tensor:
    """values - their group's mean; `scaled`: divided by its (unbiased) standard deviation + EPS.

    values float32 [n], group int64 [n]. What is alone in its group, or like all of it, gets 0.
    """
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=torch.float64)
    mean = total.index_add(0, place, values.double()) / count
    centred = values.double() - mean[place]
    if scaled:
        squares = total.index_add(0, place, centred.square())
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + EPS)[place]
    return centred.to(values.dtype)


def count_members(group: Tensor) -> Tensor:
    """How many are in the group of each, int64 [n]."""
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    return count[place]
