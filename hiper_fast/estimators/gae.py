"""Flat generalised advantage estimation over turns (arXiv 1506.02438), the baseline: one level for all tokens."""

from __future__ import annotations

import torch

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, Credit, Level, Turns, Values
from hiper_fast.ops import reference


def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`ops.gae` of V_high with `advantage.lambda_segment`."""
    advantages, returns = ops.gae(
        turns.rewards,
        values.turns[:, HIGH],
        turns.terminated,
        turns.cu_turns,
        bootstrap=values.bootstrap,
        gamma=config.gamma,
        lambda_=config.lambda_segment,
    )
    every = torch.ones_like(turns.switch)  # [turns]
    roles = reference.ACTION | reference.SUBGOAL | reference.SWITCH
    return Credit((Level("turn", roles, advantages, every, returns, every, HIGH),))
