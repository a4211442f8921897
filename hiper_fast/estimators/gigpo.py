"""Group-in-group policy optimisation (GiGPO, arXiv 2505.10978): episodes and, where a state recurs, single turns."""

from __future__ import annotations

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Turns, requires
from hiper_fast.estimators._groups import (
    compare,
    compare_episodes,
    credit_all,
    discount_rewards,
    find_anchors,
)

STEP_WEIGHT = 1.0  # omega of the paper


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A_t = A_episode + omega A_step(t).

    A_episode is GRPO's. A_step compares the discounted return from turn t (`advantage.gamma`; the paper has
    0.95) with those of all turns of the group at which the same was seen and could be done, scaled
    alike; a state that did not recur gives 0. Groups are made with `train.group`.
    """
    of_episode = compare_episodes(turns, scaled=True)
    returns = discount_rewards(turns, config.gamma)
    of_step = compare(returns, find_anchors(turns), scaled=True)
    return credit_all("turn", turns, of_episode + STEP_WEIGHT * of_step)
