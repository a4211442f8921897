"""Learning rates that models of a size are used to, and a word where a run's are far from them.

The usual rate lies on a line of logarithms between those that are known to work: 8e-4 for this project's tiny model of
0.4 M weights, the paper's 1e-6 for one of 1.5 B. Larger models go on with 1e-6.
"""

from __future__ import annotations

from hiper_fast import estimators
from hiper_fast.config import Config

LARGE, LARGE_RATE, SLOPE = 1.5e9, 1e-6, -0.81
LORA = 10.0  # adapters' rate over that of all weights
OTHERS = 5.0  # the critic's and imitation's rate over the policy's
FAR = 10.0  # times more or less than usual


def find_usual_rate(weights: int, *, lora: bool = False) -> float:
    """The policy's, for a model of so many weights."""
    return LARGE_RATE * min(weights / LARGE, 1.0) ** SLOPE * (LORA if lora else 1.0)


def judge_rates(config: Config, weights: int, *, lora: bool = False) -> list[str]:
    """A line for each learning rate that is far from the usual one; 0 is meant so."""
    usual = find_usual_rate(weights, lora=lora)
    rates = {"train.lr": (config.train.lr, usual)}
    if estimators.needs_values(estimators.find(config.advantage.estimator)):
        rates["train.critic_lr"] = config.train.critic_lr, OTHERS * usual
    if config.warm_start.enabled == "yes":
        rates["warm_start.lr"] = config.warm_start.lr, OTHERS * usual
    models = f"models of {weights / 1e6:,.1f} M weights" + " with adapters" * lora
    return [
        f"warning: {name} is {rate:g}, {describe(rate / usual)} what {models} are used to; about {usual:.0e} is usual"
        for name, (rate, usual) in rates.items()
        if rate and not usual / FAR <= rate <= usual * FAR
    ]


def describe(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio > 1 else f"1/{1 / ratio:,.0f} of"
