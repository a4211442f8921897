"""Generated games in the real TextWorld: text, commands and victory as in our engine."""

import random

import pytest

from hiper_fast.envs.alfworld import AlfWorld
from hiper_fast.envs.household import SIZES, TASK_TYPES, Household, generate

pytest.importorskip(
    "textworld", reason="TextWorld is not installed: pip install 'hiper_fast[alfworld]'"
)

from hiper_fast.envs.textworld import TextWorld  # noqa: E402


def same(ours, theirs):
    assert ours == theirs
    return ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_walkthrough_wins_and_reads_the_same(task_type, size):
    game = generate(task_type, 7, size)
    ours, theirs = AlfWorld(game), TextWorld(game)
    _, info = same(ours.reset(), theirs.reset())
    assert not info["won"]
    for command in game["walkthrough"]:
        assert not info["won"]
        assert command in info["admissible_commands"]
        _, reward, terminated, truncated, info = same(ours.step(command), theirs.step(command))
    assert (reward, terminated, truncated, info["won"]) == (10.0, True, False, True)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_random_play_reads_the_same(task_type):
    rng = random.Random(task_type)
    game = generate(task_type, 11, "small")
    ours, theirs = AlfWorld(game), TextWorld(game)
    _, info = same(ours.reset(), theirs.reset())
    for _ in range(40):
        commands = info["admissible_commands"]
        rare = [
            c
            for c in commands
            if c.split()[0] in ("clean", "heat", "cool", "use", "slice", "move", "examine")
        ]
        command = rng.choice(
            rng.choice([commands, rare or commands, ["go to moon 1", "take apple", ""]])
        )
        _, _, terminated, _, info = same(ours.step(command), theirs.step(command))
        if terminated:
            break


def test_household_plays_with_either_engine():
    ours, theirs = Household(engine="native"), Household(engine="textworld")
    same(ours.reset(seed=5), theirs.reset(seed=5))
    same(ours.step("look"), theirs.step("look"))
