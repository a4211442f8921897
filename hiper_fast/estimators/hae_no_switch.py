"""HAE without its third level: switch tokens do not train, as an ablation."""

from __future__ import annotations

from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Turns, Values, hae


def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`hae`'s low and high levels; V_switch is neither used nor learned."""
    low, high, _ = hae.estimate(turns, values, config).levels
    return Credit((low, high))
