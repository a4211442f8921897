"""GRPO without its division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

import torch

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Level, Turns, requires
from hiper_fast.estimators._groups import EVERY_ROLE, compare, find_episodes, sum_rewards


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A = R - mean of the group's R, the same for all of an episode's turns. Groups are made with `train.group`."""
    advantages = compare(sum_rewards(turns), turns.group, scaled=False)[
        find_episodes(turns)
    ]  # [turns]
    every = torch.ones_like(turns.switch)
    return Credit((Level("episode", EVERY_ROLE, advantages, every, raw=False),))
