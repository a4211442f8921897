"""GRPO without its division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Turns, requires
from hiper_fast.estimators._groups import compare_episodes, credit_all


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A = R - mean of the group's R, the same for all of an episode's turns. Groups are made with `train.group`.

    The paper's other half is the loss: `train.aggregation: constant` divides by no response's length.
    """
    return credit_all("episode", turns, compare_episodes(turns, scaled=False))
