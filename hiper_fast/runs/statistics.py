"""What can be told of success rates from a few seeds and one panel of games.

Outcomes are float64 [seeds, games] in [0, 1]: 1 won, 0 lost, between where an evaluation was interpolated. All
arms of a comparison have the same seeds and games, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from hiper_fast.options import ConfigError
from hiper_fast.runs.metrics import wilson

CONFIDENCE = 0.95
TRIMMED = 0.25  # share that the interquartile mean leaves out at each end
RESAMPLES = 2000

Statistic = Callable[..., float]  # of one or two arms' outcomes


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None where the data give none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def import_scipy_stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigError(
            f"a comparison needs scipy ({error}); pip install 'hiper_fast[compare]'"
        ) from error
    return stats


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds with Student's interval, mean +- t_{n-1} s / sqrt(n).

    `values` [seeds] may be paired differences. No interval for one seed, nor for seeds all alike: s = 0 says
    that the panel is too coarse, not that there is no spread.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean)
    stats = import_scipy_stats()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return Estimate(mean, mean - float(half), mean + float(half))


def pool(outcomes: np.ndarray) -> Estimate:
    """Success of games that were each played several times, `outcomes` [plays, games], with Wilson's interval.

    Plays of one game are alike, so they are no further games: the interval is that of so many games as would give
    the variance that the games' means have. With one play that is as many as there are.
    """
    means, (plays, games) = outcomes.mean(0), outcomes.shape
    rate, spread = float(means.mean()), float(means.var())
    single = rate * (1 - rate)  # the variance of games played once
    count = games if not single else games * min(plays, single / spread if spread else plays)
    return Estimate(rate, *wilson(rate * count, count))


def interquartile_mean(outcomes: np.ndarray) -> float:
    """The mean of the seeds' success rates without the lowest and highest quarter, rounded down to whole seeds.

    So with fewer than four seeds it is the mean (Agarwal et al. 2021, arXiv 2108.13264).
    """
    return float(import_scipy_stats().trim_mean(outcomes.mean(1), TRIMMED))


def probability_of_improvement(outcomes: np.ndarray, reference: np.ndarray) -> float:
    """The share of pairs of seeds in which `outcomes` succeeds more often than `reference`; ties count half.

    Mann-Whitney's U over the number of pairs (same source).
    """
    gaps = outcomes.mean(1)[:, None] - reference.mean(1)  # [seeds, seeds]
    return float((np.sign(gaps).mean() + 1) / 2)


def bootstrap(statistic: Statistic, types: Sequence[str], *arms: np.ndarray) -> Estimate:
    """`statistic(*arms)` with its percentile interval over seeds and games, both drawn with replacement.

    Games are drawn within their task type (`types` [games]), and what is drawn is the same for all `arms`,
    which share panel and seeds. Drawing both counts the noise of single games once more than there is: with
    few seeds the interval is about as wide as it should be, with many somewhat wider. None with one seed.
    """
    seeds = len(arms[0])
    value = statistic(*arms)
    if seeds < 2:
        return Estimate(value)
    strata = [np.flatnonzero(np.asarray(types) == name) for name in sorted(set(types))]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(seeds, size=seeds)
        games = np.concatenate(
            [games[rng.integers(len(games), size=len(games))] for games in strata]
        )
        draws.append(statistic(*(arm[drawn[:, None], games] for arm in arms)))
    tail = (1 - CONFIDENCE) / 2
    return Estimate(value, *map(float, np.quantile(draws, (tail, 1 - tail))))


def interpolate(x: Sequence[float], values: np.ndarray, at: float) -> np.ndarray:
    """`values` [n, ...] at rising `x` [n], linearly between its neighbours; the ends' beyond them."""
    right = int(np.searchsorted(x, at))
    if right in (0, len(x)):
        return values[min(right, len(x) - 1)]
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def find_crossing(x: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The x at which `values` [n], linear between its points, first reach `level`; None: they do not."""
    i = next((i for i, value in enumerate(values) if value >= level), None)
    if not i:
        return None if i is None else float(x[0])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
