"""Our engine beside the real TextWorld on official games: every text, list and reward equal.

Generated games are compared in test_household_textworld.py.
"""

import builtins
import random
import sys
import tarfile

import pytest
from test_alfworld_engine import tiny
from test_alfworld_games import age

from hiper_fast import envs
from hiper_fast.envs import household
from hiper_fast.envs.alfworld import TASK_TYPES, AlfWorld, Game
from hiper_fast.envs.alfworld.game import read_game
from hiper_fast.envs.textworld import TextWorld


def test_missing_package_names_the_extra(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "textworld":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'hiper_fast\[alfworld\]'"):
        TextWorld(tiny())


@pytest.fixture(scope="module")
def textworld():
    reason = "the alfworld extra is not installed: pip install 'hiper_fast[alfworld]'"
    pytest.importorskip("textworld", reason=reason)
    pytest.importorskip("fast_downward", reason=reason)


@pytest.fixture(scope="module")
def official(data_dir, tmp_path_factory):
    """A few official games of each task type, as paths."""
    archive = data_dir / "alfworld" / "valid_seen.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    root = tmp_path_factory.mktemp("alfworld")
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.name.endswith("game.tw-pddl")), key=lambda m: m.name)
        by_type = {type_: [m for m in members if f"/{type_}-" in m.name] for type_ in TASK_TYPES}
        tar.extractall(root, members=[m for found in by_type.values() for m in found[:1]])
    return sorted(root.rglob("game.tw-pddl"))


def assert_agree(game, commands, steps=40, seed=0):
    """Play `commands`, then what a busy random policy does; every return value must be equal."""
    rng = random.Random(seed)
    ours, theirs = AlfWorld(game), TextWorld(game)
    result = ours.reset()
    assert result == theirs.reset()
    commands = list(commands)
    for _ in range(len(commands) + steps):
        admissible = result[-1]["admissible_commands"]
        busy = [
            c for c in admissible if not c.startswith(("go to", "examine", "help", "inventory"))
        ]
        command = (
            commands.pop(0) if commands else rng.choice(busy if rng.random() < 0.7 else admissible)
        )
        if rng.random() < 0.05:
            assert ours.step(command.upper()) == theirs.step(command.upper())
        result = ours.step(command)
        assert result == theirs.step(command), command
    return result


def test_official_walkthroughs_and_random_play_agree(textworld, official):
    for seed, path in enumerate(official):
        assert_agree(path, Game.load(path).walkthrough, steps=15, seed=seed)


def test_an_official_game_in_the_words_before_alfworld_0_4_agrees(textworld, official):
    path = next(path for path in official if "pick_two_obj" in str(path))
    game = age(read_game(path))
    result = assert_agree(game, [*game["walkthrough"][:4], "help", *game["walkthrough"][4:]])
    assert "help" not in result[-1]["admissible_commands"]


def test_a_generated_game_in_the_words_before_alfworld_0_4_agrees(textworld):
    game = age(household.generate(TASK_TYPES[0], seed=1, size="small"))
    assert_agree(game, game["walkthrough"], steps=15)


def test_switching_games_and_arguments(textworld):
    first = household.generate(TASK_TYPES[0], seed=1, size="small")
    second = household.generate(TASK_TYPES[1], seed=2, size="small")
    arguments = list(sys.argv)
    env = TextWorld(first)
    text, info = env.reset(options={"game": second})
    assert (text, info) == AlfWorld(second).reset()
    assert sys.argv == arguments  # the planner behind it overwrites them
    with pytest.raises(ValueError, match="unknown reset option"):
        env.reset(options={"seed": 3})
    with pytest.raises(TypeError, match="plays a game file or dict"):
        env.reset(options={"game": Game.from_dict(first)})


def test_make_builds_the_second_engine(textworld, official, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(official[0].parents[3]))
    both = [
        envs.make("alfworld", split="valid_seen", engine=engine)
        for engine in ("native", "textworld")
    ]
    ours, theirs = (env.reset(seed=5) for env in both)
    assert ours == theirs
