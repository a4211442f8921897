"""An agent that only acts, as flat PPO's does: prompts, responses, roles, a whole run."""

import json

import pytest
from helpers import configure, make_tiny

from hiper_fast import train
from hiper_fast.distributed import ALONE
from hiper_fast.envs.family import families
from hiper_fast.envs.player import Move
from hiper_fast.envs.prompts import State
from hiper_fast.learn.credit import view_turns
from hiper_fast.learn.warm_start import demonstrate, write_response
from hiper_fast.ops import reference
from hiper_fast.options import ConfigError
from hiper_fast.response import parse
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.prompter import Prompter

ALL = [(name, style) for name in ("household", "webshop") for style in families.find(name).styles]


def state(**changes):
    fields = {"task": "put a mug in desk.", "observation": "On the desk 1, you see nothing."}
    return State(**fields, commands=["go to desk 1", "help"], subgoal="find a mug", **changes)


@pytest.mark.parametrize("name, style", ALL)
@pytest.mark.parametrize("context", [[], [1, 2]])
def test_no_prompt_speaks_of_subgoals(name, style, context):
    render = families.find(name).styles[style].render
    plans, acts = (render(state(context=context, plans=plans)) for plans in (True, False))
    assert "find a mug" in plans and "subgoal" in plans
    for word in ("subgoal", "find a mug", "KEEP", "\n\n\n"):
        assert word not in acts
    if style != "compact" and not context:
        assert "<action>one admissible action, word for word</action>" in acts


@pytest.mark.parametrize(
    "text, valid",
    [
        ("<action>look</action>", True),
        ("I look. <action>look</action>", True),
        ("<switch>KEEP</switch><subgoal>s</subgoal><action>look</action>", True),
        ("look", False),
        ("<action>look", False),
        ("<action>\u770b</action>", False),
    ],
)
def test_a_response_is_valid_with_an_action_alone(text, valid):
    assert parse(text, plans=False).valid == valid
    assert write_response(Move("find", "look"), None, plans=False) == "<action>look</action>"


def test_demonstrations_hold_actions_alone():
    agent, config = make_tiny(), configure(agent__subgoals=False, warm_start__episodes=6)
    games = Games(config)
    prompter = Prompter(agent.tokenizer, config.agent, games.family.styles["compact"])
    trajectories, _ = demonstrate(agent, games, prompter, config)
    assert trajectories.valid.all() and not trajectories.switch.any()
    assert (view_turns(trajectories).roles == reference.ACTION).all()
    assert all(turn.subgoal is None for e in trajectories.episodes for turn in e.turns)


@pytest.mark.parametrize("style", ["compact", "transcript"])
@pytest.mark.parametrize("estimator", ["gae", "hae"])
def test_it_trains(style, estimator, tmp_path):
    config = configure(
        agent__subgoals=False, agent__style=style, agent__max_prompt_tokens=600,
        advantage__estimator=estimator, env__max_turns=4,
        train__updates=1, train__critic_updates=0, train__warmup_updates=0, train__episodes=4, train__minibatches=2,
        warm_start__episodes=4, eval__episodes=4, run__folder=str(tmp_path), run__name="run", run__display="none",
    )  # fmt: skip
    train.train(config, ALONE)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if row["stage"] == "train"]
    assert row["rollout/switch_rate"] == 0 and row["loss/policy"] != 0
    assert (tmp_path / "run/report.html").exists()


def test_nothing_is_kept_where_there_is_no_subgoal():
    with pytest.raises(ConfigError, match=r"reward.keep: without subgoals .*set it to 0, not -0.3"):
        configure(agent__subgoals=False, reward__keep=-0.3)
