"""Flat generalised advantage estimation over turns (arXiv 1506.02438), the baseline: one level for all tokens."""

from __future__ import annotations

import torch

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import EVERY_ROLE, HIGH, Credit, Level, Turns, Values


def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`ops.gae` of V_high with `advantage.lambda_segment`. `advantage.bootstrap: reference` bootstraps nothing: nor
    does the reference implementation's."""
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
    return Credit((Level("turn", EVERY_ROLE, advantages, every, returns, every, HIGH),))
