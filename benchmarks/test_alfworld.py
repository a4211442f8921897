"""ALFWorld engines: steps a second and time to reset and parse, ours beside the real TextWorld.

Official games under $ALFWORLD_DATA if it is set, else generated ones. The commands of a random policy are
recorded first; both engines replay them, and TextWorld is timed only once it has answered as ours does.
"""

import os
import random

import pytest

from hiper_fast.envs import household
from hiper_fast.envs.alfworld import TASK_TYPES, AlfWorld, Game, games
from hiper_fast.envs.alfworld.game import read_game

TINY = os.environ.get("HIPER_FAST_BENCH") == "tiny"
GAMES, STEPS = (2, 20) if TINY else (24, 200)
PEER_STEPS = 5 if TINY else 40  # TextWorld needs about a tenth of a second for each


@pytest.fixture(scope="module")
def contents():
    """Game dicts: an even sample of the official training games, or generated ones."""
    if os.environ.get("ALFWORLD_DATA"):
        paths = games("train")
        return [read_game(path) for path in paths[:: max(1, len(paths) // GAMES)][:GAMES]]
    return [household.generate(TASK_TYPES[seed % 6], seed, "large") for seed in range(GAMES)]


@pytest.fixture(scope="module")
def parsed(contents):
    return [Game.from_dict(content) for content in contents]


@pytest.fixture(scope="module")
def commands(parsed):
    """What a random policy does in each game."""
    rng = random.Random(0)
    recorded = []
    for game in parsed:
        env = AlfWorld(game)
        _, info = env.reset()
        recorded.append([])
        for _ in range(STEPS):
            recorded[-1].append(rng.choice(info["admissible_commands"]))
            *_, info = env.step(recorded[-1][-1])
    return recorded


def replay(envs, commands):
    for env, its_commands in zip(envs, commands, strict=True):
        for command in its_commands:
            env.step(command)


def reset(envs):
    for env in envs:
        env.reset()


def record_rate(benchmark, name, count):
    benchmark.extra_info[name] = round(count / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="alfworld-step")
def test_native_steps(benchmark, parsed, commands):
    envs = [AlfWorld(game) for game in parsed]
    benchmark.pedantic(
        replay, setup=lambda: reset(envs), args=(envs, commands), rounds=2 if TINY else 20
    )
    record_rate(benchmark, "steps_per_second", sum(map(len, commands)))


@pytest.mark.benchmark(group="alfworld-reset")
def test_native_reset(benchmark, parsed):
    envs = [AlfWorld(game) for game in parsed]
    benchmark(reset, envs)
    record_rate(benchmark, "resets_per_second", len(envs))


@pytest.mark.benchmark(group="alfworld-parse")
def test_native_parse(benchmark, contents):
    benchmark(lambda: [Game.from_dict(content) for content in contents])
    record_rate(benchmark, "games_per_second", len(contents))


@pytest.fixture(scope="module")
def peer(contents, commands):
    """TextWorld on the first game, once it has answered as our engine does."""
    reason = "the alfworld extra is not installed: pip install 'hiper_fast[alfworld]'"
    pytest.importorskip("textworld", reason=reason)
    pytest.importorskip("fast_downward", reason=reason)
    from hiper_fast.envs.textworld import TextWorld

    ours, theirs = AlfWorld(contents[0]), TextWorld(contents[0])
    assert ours.reset() == theirs.reset()
    for command in commands[0][:PEER_STEPS]:
        assert ours.step(command) == theirs.step(command), command
    return theirs


@pytest.mark.benchmark(group="alfworld-step")
def test_textworld_steps(benchmark, peer, commands):
    few = [commands[0][:PEER_STEPS]]
    benchmark.pedantic(
        replay, setup=lambda: reset([peer]), args=([peer], few), rounds=1 if TINY else 3
    )
    record_rate(benchmark, "steps_per_second", len(few[0]))


@pytest.mark.benchmark(group="alfworld-reset")
def test_textworld_reset(benchmark, peer):
    benchmark.pedantic(peer.reset, rounds=1 if TINY else 3)
    record_rate(benchmark, "resets_per_second", 1)
