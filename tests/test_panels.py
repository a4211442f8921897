"""The panels `test` and `tune` share no game with each other, nor with training."""

import json

import pytest
from helpers import configure

from hiper_fast.envs import household
from hiper_fast.envs.alfworld.split import HELD_OUT
from hiper_fast.options import ConfigError
from hiper_fast.rollout.games import Games


def list_panels(**options):
    panels = {}
    for panel in ("test", "tune"):
        games = Games(configure(eval__panel=panel, **options))
        panels[panel] = games.list_panel()
    return games, panels


def test_household_panels_share_no_seed():
    games, panels = list_panels(eval__episodes=300)
    seeds = {name: {task["seed"] for task in tasks} for name, tasks in panels.items()}
    assert len(seeds["test"]) == len(seeds["tune"]) == 300
    assert not seeds["test"] & seeds["tune"]
    drawn = {task["seed"] for task in games.draw("update 1", 300)}
    assert max(drawn) < min(seeds["test"] | seeds["tune"])


@pytest.mark.parametrize("by", ["goal", "product"])
def test_webshop_panels_share_no_goal(by):
    games, panels = list_panels(name="webshop", env__split_by=by, eval__episodes=500)

    def name(goal):
        return goal["asin"] if by == "product" else (goal["asin"], goal["instruction_text"])

    goals = {p: {name(task["options"]["goal"]) for task in tasks} for p, tasks in panels.items()}
    assert goals["test"] and goals["tune"] and not goals["test"] & goals["tune"]
    env = games.make(1)[0]
    for task in games.draw("update 1", 100):
        env.reset(**task)
        assert name(env.goal) not in goals["test"] | goals["tune"]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A data set of as many tasks as are needed to hold one out, of two trials each."""
    game = json.dumps(household.generate("pick_and_place_simple", 0, "small"))
    for split, tasks in (("train", 2 * HELD_OUT), ("valid_seen", 3)):
        for number in range(tasks):
            for trial in range(2):
                place = tmp_path / "json_2.1.1" / split / f"task-{number}" / f"trial-{trial}"
                place.mkdir(parents=True)
                (place / "game.tw-pddl").write_text(game)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))


def test_alfworld_tunes_on_tasks_held_out_of_training(official):
    games, panels = list_panels(name="alfworld", eval__episodes=100)
    paths = {p: {task["options"]["game"] for task in tasks} for p, tasks in panels.items()}
    assert len(paths["test"]) == 6 and all("valid_seen" in str(path) for path in paths["test"])
    tasks = {path.parent.parent for path in paths["tune"]}
    assert len(paths["tune"]) == 4 and len(tasks) == 2, "two of forty tasks, all their trials"
    assert all("train" in str(path) for path in paths["tune"])
    kept = set(games.make(1)[0]._games)
    assert len(kept) == 2 * 2 * HELD_OUT - 4 and not kept & paths["tune"]


def test_too_few_tasks_hold_none_out(official):
    with pytest.raises(ConfigError, match="eval.panel tune holds games out of 'valid_seen'"):
        Games(configure("alfworld", eval__panel="tune", env__split="valid_seen"))
