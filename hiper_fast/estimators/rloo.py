"""REINFORCE with the mean of the group's other episodes as baseline (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Turns, requires
from hiper_fast.estimators._groups import (
    compare_episodes,
    count_members,
    credit_all,
    find_episodes,
)


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """A = R - mean R of the n - 1 others = (R - mean of all n) n / (n - 1); 0 for one that is alone."""
    count = count_members(turns.group)[find_episodes(turns)]  # [turns]
    centred = compare_episodes(turns, scaled=False)
    return credit_all("episode", turns, centred * count / (count - 1).clamp(min=1))
