"""What estimators that compare episodes of one game share."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.estimators import EVERY_ROLE, Credit, Level, Turns
from hiper_fast.ops import gae

EPS = 1e-6  # beside a standard deviation, as verl and TRL have it


def credit_all(name: str, turns: Turns, advantages: Tensor) -> Credit:
    """One level for all tokens, its advantages [turns] as they are."""
    every = torch.ones_like(turns.switch)
    return Credit((Level(name, EVERY_ROLE, advantages, every, raw=False),))


def compare_episodes(turns: Turns, *, scaled: bool) -> Tensor:
    """Each episode's return compared in its group, float32 [turns]: the same for all of its turns."""
    return compare(sum_rewards(turns), turns.group, scaled=scaled)[find_episodes(turns)]


def find_anchors(turns: Turns) -> Tensor:
    """int64 [turns]; equal: turns of one group at which the same was seen and could be done."""
    states = torch.stack([turns.group[find_episodes(turns)], turns.state], 1)  # [turns, 2]
    return states.unique(dim=0, return_inverse=True)[1]


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
