"""Hierarchical credit without a critic: each level's returns against those of the group."""

from __future__ import annotations

import torch

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Level, Turns, requires
from hiper_fast.estimators._groups import (
    compare,
    count_members,
    discount_rewards,
    find_anchors,
    find_episodes,
)
from hiper_fast.ops import reference


@requires(values=False, groups=True)
def estimate(turns: Turns, values: None, config: AdvantageConfig) -> Credit:
    """With the discounted return G_t from turn t on, each level compares G where it decides.

    Subgoal tokens: boundary turns of the group with each other. Switch tokens: all its turns. Action
    tokens: its turns at which the same was seen and could be done, else (a state that did not recur)
    all its turns. Every comparison is scaled as GRPO's. Groups are made with `train.group`.
    """
    group = turns.group[find_episodes(turns)]  # [turns]
    first = turns.cu_turns[:-1][turns.cu_turns.diff() > 0].long()  # [episodes that have turns]
    boundary = turns.switch.index_fill(0, first, True)  # [turns]
    returns = discount_rewards(turns, config.gamma)
    high = torch.zeros_like(returns)
    high[boundary] = compare(returns[boundary], group[boundary], scaled=True)
    switch = compare(returns, group, scaled=True)
    anchor = find_anchors(turns)
    recurs = count_members(anchor) > 1  # [turns]
    low = torch.where(recurs, compare(returns, anchor, scaled=True), switch)
    every = torch.ones_like(turns.switch)
    return Credit((
        Level("low", reference.ACTION, low, every, raw=False),
        Level("high", reference.SUBGOAL, high, boundary, raw=False),
        Level("switch", reference.SWITCH, switch, every, raw=False),
    ))  # fmt: skip
