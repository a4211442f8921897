"""REINFORCE with the mean of the group's other episodes as baseline (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

import torch

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Level, Turns, requires
from hiper_fast.estimators._groups import (
    EVERY_ROLE,
    compare,
    count_members,
    find_episodes,
    sum_rewards,
)


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A = R - mean R of the n - 1 others = (R - mean of all n) n / (n - 1); 0 for one that is alone."""
    count = count_members(turns.group)
    centred = compare(sum_rewards(turns), turns.group, scaled=False)  # [trajectories]
    advantages = (centred * count / (count - 1).clamp(min=1))[find_episodes(turns)]  # [turns]
    every = torch.ones_like(turns.switch)
    return Credit((Level("episode", EVERY_ROLE, advantages, every, raw=False),))
