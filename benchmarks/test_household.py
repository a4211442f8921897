"""Generated games: how many a second, made alone and made, parsed and started."""

import itertools
import os

import pytest

from hiper_fast.envs.alfworld import AlfWorld
from hiper_fast.envs.household import SIZES, TASK_TYPES, generate

GAMES = 6 if os.environ.get("HIPER_FAST_BENCH") == "tiny" else 300


def games(seeds, size):
    return [generate(TASK_TYPES[seed % 6], seed, size) for seed in itertools.islice(seeds, GAMES)]


@pytest.mark.parametrize("size", SIZES)
def test_generate(benchmark, size):
    seeds = itertools.count()
    made = benchmark(games, seeds, size)
    assert len({game["pddl_problem"] for game in made}) == GAMES
    benchmark.extra_info["games"] = GAMES


@pytest.mark.parametrize("size", SIZES)
def test_generate_and_start(benchmark, size):
    seeds = itertools.count()
    starts = benchmark(lambda: [AlfWorld(game).reset() for game in games(seeds, size)])
    assert not any(info["won"] for _, info in starts)
    benchmark.extra_info["games"] = GAMES
