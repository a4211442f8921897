"""Hierarchical advantage estimation (HiPER, arXiv 2602.16165): a level each for action, subgoal and switch."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH, Credit, Level, Turns, Values
from hiper_fast.ops import reference


def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`ops.hae` of the three values; a truncated episode's low level bootstraps like a segment's end, unless
    `advantage.bootstrap` is `reference`.

    V_low stands behind the subgoal. Of a turn without that block it would know that the turn has failed
    already, and its tokens would look no worse than any: with `advantage.malformed` such a turn is
    measured against V_switch, which knows only the prompt, and V_low does not learn from it.
    """
    low, high, switch = values.turns.unbind(1)
    named = (turns.roles & reference.SUBGOAL > 0) | (not config.malformed)
    low = torch.where(named, low, switch)
    bootstrap_low = bootstrap_high = values.bootstrap
    if config.bootstrap == "reference":
        bootstrap_low, bootstrap_high = reuse_last_values(turns, low, high)
    found = ops.hae(
        turns.rewards,
        low,
        high,
        turns.switch,
        turns.terminated,
        turns.cu_turns,
        values_switch=switch,
        bootstrap_low=bootstrap_low,
        bootstrap_high=bootstrap_high,
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


def reuse_last_values(turns: Turns, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference implementation takes for the state after each episode, float32 [trajectories] each:
    V_low [turns] of its last turn, and V_high [turns] at its last segment's start."""
    played = turns.cu_turns.diff() > 0  # [trajectories]
    first, last = turns.cu_turns[:-1][played].long(), turns.cu_turns[1:][played].long() - 1
    boundary = turns.switch.index_fill(0, first, True)  # [turns]
    start = (torch.arange(len(boundary)) * boundary).cummax(0).values  # [turns], of its segment
    bootstrap_low, bootstrap_high = (low.new_zeros(len(played)) for _ in range(2))
    bootstrap_low[played], bootstrap_high[played] = low[last], high[start[last]]
    return bootstrap_low, bootstrap_high
