"""Group-in-group policy optimisation (GiGPO, arXiv 2505.10978): episodes and, where a state recurs, single turns."""

from __future__ import annotations

import torch

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Level, Turns, requires
from hiper_fast.estimators._groups import (
    EVERY_ROLE,
    compare,
    discount_rewards,
    find_episodes,
    sum_rewards,
)

STEP_WEIGHT = 1.0  # omega of the paper


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A_t = A_episode + omega A_step(t).

    A_episode is GRPO's. A_step compares the discounted return from turn t (`advantage.gamma`; the paper has
    0.95) with those of all turns of the group at which the same was seen and could be done, scaled
    alike; a state that did not recur gives 0. Groups are made with `train.group`.
    """
    episode = find_episodes(turns)
    of_episode = compare(sum_rewards(turns), turns.group, scaled=True)[episode]  # [turns]
    anchor = torch.stack([turns.group[episode], turns.state], 1).unique(dim=0, return_inverse=True)[
        1
    ]
    of_step = compare(discount_rewards(turns, config.gamma), anchor, scaled=True)  # [turns]
    every = torch.ones_like(turns.switch)
    advantages = of_episode + STEP_WEIGHT * of_step
    return Credit((Level("turn", EVERY_ROLE, advantages, every, raw=False),))
