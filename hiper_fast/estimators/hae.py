"""Hierarchical advantage estimation (HiPER, arXiv 2602.16165): a level each for action, subgoal and switch."""

from __future__ import annotations

import torch

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH, Credit, Level, Turns, Values
from hiper_fast.ops import reference


def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`ops.hae` of the three values; a truncated episode's low level bootstraps like a segment's end.

    V_low stands behind the subgoal. Of a turn without that block it would know that the turn has failed
    already, and its tokens would look no worse than any: with `advantage.malformed` such a turn is
    measured against V_switch, which knows only the prompt, and V_low does not learn from it.
    """
    low, high, switch = values.turns.unbind(1)
    named = (turns.roles & reference.SUBGOAL > 0) | (not config.malformed)
    found = ops.hae(
        turns.rewards,
        torch.where(named, low, switch),
        high,
        turns.switch,
        turns.terminated,
        turns.cu_turns,
        values_switch=switch,
        bootstrap_low=values.bootstrap,
        bootstrap_high=values.bootstrap,
        gamma=config.gamma,
        lambda_turn=config.lambda_turn,
        lambda_segment=config.lambda_segment,
    )
    every = torch.ones_like(named)  # [turns]
    return Credit((
        Level("low", reference.ACTION, found.advantages_low, every, found.returns_low, named, LOW),
        Level("high", reference.SUBGOAL, found.advantages_high, found.boundary, found.returns_high,
              found.boundary, HIGH),
        Level("switch", reference.SWITCH, found.advantages_switch, every, found.returns_switch, every, SWITCH),
    ))  # fmt: skip
