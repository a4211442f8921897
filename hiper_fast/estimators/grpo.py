"""Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300): an episode against its group's others."""

from __future__ import annotations

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Turns, requires
from hiper_fast.estimators._groups import compare_episodes, credit_all


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A = (R - mean of the group's R) / (their standard deviation + 1e-6), the same for all of an episode's turns.

    Groups are made with `train.group`.
    """
    return credit_all("episode", turns, compare_episodes(turns, scaled=True))
