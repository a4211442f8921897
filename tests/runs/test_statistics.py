"""Means, interquartile means, improvement, bootstrap and interpolation: hand figures and plain loops."""

import itertools
import math
import random
import sys

import numpy as np
import pytest

from hiper_fast.options import ConfigError
from hiper_fast.runs import statistics
from hiper_fast.runs.metrics import wilson
from hiper_fast.runs.statistics import (
    Estimate,
    bootstrap,
    estimate_mean,
    find_crossing,
    interpolate,
    interquartile_mean,
    pool,
    probability_of_improvement,
)

scipy_stats = pytest.importorskip("scipy.stats")


def make_outcomes(rates, games=10):
    """[seeds, games] with these success rates."""
    return np.array([[1.0] * round(r * games) + [0.0] * (games - round(r * games)) for r in rates])


# The mean and its interval.


def test_mean_by_hand():
    # mean 3, s = 1, t_{2, 0.975} = 4.302653 (tables); 4.302653 / sqrt(3) = 2.484138
    assert estimate_mean([2.0, 3.0, 4.0]) == pytest.approx((3.0, 0.515862, 5.484138), abs=1e-6)
    # t_{1, 0.975} = 12.7062; s = sqrt(2), so half = 12.7062
    assert estimate_mean([0.0, 2.0]) == pytest.approx((1.0, -11.7062, 13.7062), abs=1e-4)


@pytest.mark.parametrize("values", [[0.4], [0.4, 0.4], [0.0, 0.0, 0.0]])
def test_no_interval_where_there_is_no_spread(values):
    estimate = estimate_mean(values)
    assert estimate == (pytest.approx(values[0]), None, None)
    assert estimate.half_width is None and not estimate.excludes_zero


def test_mean_as_scipys_test_has_it():
    rng = np.random.default_rng(1)
    for n in (2, 3, 6, 31):
        values = rng.normal(size=n)
        low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval()
        assert estimate_mean(values) == pytest.approx((values.mean(), low, high))


def test_students_interval_holds_the_truth_in_95_of_100():
    rng = np.random.default_rng(2)
    held = [low <= 0.1 <= high for _, low, high in map(estimate_mean, rng.normal(0.1, 1, (800, 4)))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("estimate", "excludes"),
    [((1, 0.1, 2), True), ((-1, -2, -0.1), True), ((1, -0.1, 2), False), ((1, 0.0, 2), False)],
)
def test_what_covers_zero(estimate, excludes):
    assert Estimate(*estimate).excludes_zero == excludes


# The interquartile mean.


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.5], 0.5),
        ([0.1, 0.2, 0.9], 0.4),  # a quarter of three is no whole seed
        ([0.0, 0.4, 0.5, 1.0], 0.45),
        ([1.0, 0.2, 0.3, 0.4, 0.5, 0.0], 0.35),
        ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0], 0.45),
    ],
)
def test_interquartile_mean_by_hand(rates, expected):
    assert interquartile_mean(make_outcomes(rates)) == pytest.approx(expected)


def test_interquartile_mean_as_a_plain_loop():
    rng = np.random.default_rng(3)
    for n in range(1, 14):
        outcomes = rng.random((n, 7))
        rates = sorted(sum(row) / 7 for row in outcomes.tolist())
        cut = n // 4
        kept = rates[cut : n - cut]
        assert interquartile_mean(outcomes) == pytest.approx(sum(kept) / len(kept))


# Improvement.


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([0.9, 0.8], [0.1, 0.2], 1.0),
        ([0.1, 0.2], [0.9, 0.8], 0.0),
        ([0.5, 0.5], [0.5, 0.5], 0.5),
        ([0.3, 0.6], [0.3, 0.5], 0.625),  # tie, lower, higher, higher
    ],
)
def test_improvement_by_hand(new, old, expected):
    assert probability_of_improvement(make_outcomes(new), make_outcomes(old)) == expected


def test_improvement_as_loops_and_as_mann_whitney():
    rng = np.random.default_rng(4)
    for seeds, games in ((1, 1), (3, 5), (6, 40)):
        new, old = rng.integers(0, 2, (2, seeds, games)).astype(float)
        wins = 0.0
        for a, b in itertools.product(new.mean(1), old.mean(1)):
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
        got = probability_of_improvement(new, old)
        assert got == pytest.approx(wins / seeds**2)
        u = scipy_stats.mannwhitneyu(new.mean(1), old.mean(1)).statistic
        assert got == pytest.approx(u / seeds**2)


# The bootstrap.


def mean(outcomes):
    return float(outcomes.mean())


@pytest.fixture
def many_draws(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 10000)


def test_bootstrap_of_seeds_alone_is_scipys(many_draws):
    """Where all games of a seed are alike, drawing games changes nothing."""
    rates = np.array([0.1, 0.23, 0.35, 0.41, 0.58, 0.7, 0.87])
    outcomes = np.repeat(rates[:, None], 6, axis=1)
    theirs = scipy_stats.bootstrap(
        (rates,), np.mean, method="percentile", n_resamples=10000, rng=1
    ).confidence_interval
    estimate = bootstrap(mean, ["a"] * 6, outcomes)
    assert estimate == pytest.approx((rates.mean(), theirs.low, theirs.high), abs=0.012)


def test_bootstrap_as_plain_loops(many_draws):
    rng, plain = np.random.default_rng(5), random.Random(5)
    types = ["b", "a", "b", "a", "b"]
    outcomes = rng.random((6, 5))
    draws = []
    for _ in range(10000):
        seeds = [plain.randrange(6) for _ in range(6)]
        games = [plain.choice([1, 3]) for _ in range(2)] + [
            plain.choice([0, 2, 4]) for _ in range(3)
        ]
        draws.append(sum(outcomes[s][g] for s in seeds for g in games) / 30)
    draws.sort()
    expected = outcomes.mean(), draws[250], draws[9750]
    assert bootstrap(mean, types, outcomes) == pytest.approx(expected, abs=0.012)


def test_bootstrap_keeps_strata_and_pairs():
    """Games that differ between types alone have no spread, and arms that differ by a constant none either."""
    types = ["a"] * 3 + ["b"] * 2
    outcomes = np.array([[1.0, 1, 1, 0, 0]] * 4)
    assert bootstrap(mean, types, outcomes) == pytest.approx((0.6, 0.6, 0.6))
    rng = np.random.default_rng(6)
    arm = rng.random((4, 5))
    gap = bootstrap(lambda a, b: float((a - b).mean()), types, arm + 0.25, arm)
    assert gap == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_of_one_seed_has_no_interval_and_of_one_game_has_one():
    assert bootstrap(mean, ["a"], np.array([[1.0]])) == (1.0, None, None)
    assert bootstrap(mean, ["a"], np.array([[1.0], [0.0]])) == (0.5, 0.0, 1.0)


def test_bootstrap_is_the_same_every_time():
    outcomes = np.random.default_rng(7).random((4, 9))
    assert bootstrap(mean, ["a"] * 9, outcomes) == bootstrap(mean, ["a"] * 9, outcomes)


# Between evaluations.


def test_interpolation_by_hand():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    x = [0, 100, 300]
    for at, expected in [
        (-5, [0, 1]), (0, [0, 1]), (25, [0.25, 1]), (100, [1, 1]), (150, [1, 0.75]), (300, [1, 0]), (999, [1, 0]),
    ]:  # fmt: skip
        assert interpolate(x, values, at) == pytest.approx(np.array(expected)), at
    assert interpolate([7], values[:1], 9) == pytest.approx(values[0])


def test_interpolation_is_numpys():
    rng = np.random.default_rng(8)
    for n in (1, 2, 3, 9):
        x, values = np.cumsum(rng.random(n) + 0.01), rng.random((n, 4))
        for at in rng.uniform(-0.5, x[-1] + 0.5, 20):
            expected = [np.interp(at, x, values[:, game]) for game in range(4)]
            assert interpolate(x, values, at) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "level", "expected"),
    [
        ([0.5, 0.9], 0.4, 10.0),
        ([0.0, 0.5, 0.25, 1.0], 0.25, 15.0),
        ([0.0, 0.5, 0.25, 1.0], 0.75, 30 + 10 * 2 / 3),
        ([0.0, 0.5, 0.25, 1.0], 1.0, 40.0),
        ([0.0, 0.5], 0.6, None),
        ([0.3], 0.3, 10.0),
    ],
)
def test_first_crossing(values, level, expected):
    got = find_crossing([10, 20, 30, 40][: len(values)], values, level)
    assert got == (None if expected is None else pytest.approx(expected))
    if expected is not None:
        at = interpolate([10, 20, 30, 40][: len(values)], np.array(values), got)
        assert at >= level or math.isclose(at, level)


def test_without_scipy_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"needs scipy .*hiper_fast\[compare\]"):
        statistics.import_scipy_stats()


def test_pooled_intervals_are_those_of_the_games():
    once = np.array([[1.0, 1.0, 0.0, 0.0, 1.0]])
    assert pool(once) == pytest.approx((0.6, *wilson(3, 5)))
    assert pool(np.repeat(once, 9, axis=0)) == pytest.approx((0.6, *wilson(3, 5))), "no new games"
    apart = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert pool(apart) == pytest.approx((0.5, *wilson(4, 8))), "at most as many games as plays"
    assert pool(np.ones((3, 4))) == pytest.approx((1.0, *wilson(4, 4)))
    assert pool(np.zeros((1, 4))) == pytest.approx((0.0, *wilson(0, 4)))


def test_pooled_intervals_cover():
    """Games of all difficulties, each played three times: 95 of 100 intervals hold the mean of all games."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        won = rng.random((3, 200)) < rng.beta(0.7, 0.7, size=200)
        _, low, high = pool(won.astype(float))
        held += low <= 0.5 <= high
    assert 370 <= held <= 396
