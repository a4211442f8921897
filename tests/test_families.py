"""Each family of environments brings its games, prompts, players and defaults; WebShop through all of the loop."""

import random

import pytest
from helpers import configure, make_tiny

from hiper_fast.configure import RECIPES, read_file, resolve
from hiper_fast.envs.family import families
from hiper_fast.eval import evaluate, format_table
from hiper_fast.learn.warm_start import demonstrate
from hiper_fast.options import ConfigError
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import open_rollouts
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.summary import summarise_scores
from hiper_fast.rollout.trajectory import Episode


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
        monkeypatch.delenv(name, raising=False)


def settings(**options):
    return configure("webshop", **options)


def prompter(agent, games, config):
    return Prompter(agent.tokenizer, config.agent, games.family.styles["compact"])


@pytest.fixture(scope="module")
def agent():
    return make_tiny(families.find("webshop"))


OURS, FOREIGN = ["alfworld", "household", "webshop"], ["gymnasium", "openenv"]


def test_every_environment_has_a_family():
    assert families.names() == sorted([*OURS, *FOREIGN])
    for name in OURS:
        assert set(families.find(name).styles) == {"reference", "compact", "transcript"}


@pytest.mark.parametrize("name", ["household", "webshop"])
def test_a_family_plays(name):
    config = configure(name)
    family = families.find(name)(config.env)
    env = family.make()
    env.reset(**family.find_task("3"))
    player = family.make_player("search", env, random.Random(0))
    observation, info = env.reset(**family.find_task("3"))
    player.observe(None, observation, info["admissible_commands"])
    assert family.is_listed(
        player.move(info["admissible_commands"]).action, info["admissible_commands"]
    )
    with pytest.raises(ValueError, match="from 0 on"):
        family.find_task("-1")


# WebShop.


def test_webshop_has_defaults_of_its_own_which_files_and_the_command_line_overrule(tmp_path):
    config = settings()
    assert (config.env.eval_split, config.env.max_turns, config.agent.fallback) == ("test", 15, 20)
    assert resolve(given={"env.name": "household"}) == resolve(given={"env": "household"})
    assert resolve(given={"env.name": "household"}).env.max_turns != 15
    file = tmp_path / "own.yaml"
    file.write_text("env: {name: webshop, max_turns: 9}\nagent: {fallback: 7}\n")
    config = resolve([file], {"agent.fallback": "8"})
    assert (config.env.max_turns, config.agent.fallback, config.env.eval_split) == (9, 8, "test")


def test_the_official_games_have_defaults_of_their_own_also_where_auto_finds_them(monkeypatch):
    assert resolve().env.max_turns == 10
    named = resolve([], {"env.name": "alfworld"})
    assert (named.env.max_turns, named.eval.episodes) == (50, 140)
    monkeypatch.setenv("ALFWORLD_DATA", "somewhere")
    assert resolve() == named


@pytest.mark.parametrize("name", ["alfworld", "webshop"])
def test_the_papers_recipe_leaves_nothing_to_the_environments_defaults(name):
    files = RECIPES / f"{name}.yaml", families.find(name).defaults
    recipe, own = ({option: value for _, option, value in read_file(file)} for file in files)
    left = own.keys() - recipe.keys()
    assert all(option.startswith("warm_start.") for option in left), "which the recipe goes without"
    warm_start = {option: v for option, v in recipe.items() if option.startswith("warm_start.")}
    assert warm_start == {"warm_start.enabled": False}


def test_the_papers_recipe():
    config = resolve([RECIPES / "webshop.yaml"], {})
    assert config.env.name == "webshop" and config.env.max_turns == 15
    assert (config.reward.keep, config.reward.keep_mode, config.reward.consistency) == (
        -3.5,
        "normalized",
        -0.3,
    )
    assert (
        config.advantage.bootstrap == "none"
        and config.agent.max_prompt_tokens == 4096
        and config.agent.fallback == 20
    )


@pytest.mark.parametrize("by", ["goal", "product"])
def test_the_panel_is_fixed_distinct_and_never_trained_on(by):
    config = settings(env__split_by=by, eval__episodes="500")
    games = Games(config)
    panel = [task["options"]["goal"] for task in games.list_panel()]
    texts = {goal["instruction_text"] for goal in panel}
    config.run.seed = 5
    assert [t["options"]["goal"] for t in Games(config).list_panel()] == panel and len(panel) >= 490
    env = games.make(1)[0]
    trained = []
    for task in games.draw("update 1", 300):
        env.reset(**task)
        trained.append(env.goal)
    assert len({goal["instruction_text"] for goal in trained}) > 200
    if by == "product":
        assert not {goal["asin"] for goal in trained} & {goal["asin"] for goal in panel}
    else:
        pairs = {(goal["asin"], goal["instruction_text"]) for goal in panel}
        assert not pairs & {(goal["asin"], goal["instruction_text"]) for goal in trained}
        assert len(pairs) == len(panel) >= len(texts)


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="nowhere"):
        Games(settings(env__data="nowhere"))
    with pytest.raises(ConfigError, match="split"):
        Games(settings(env__eval_split="valid_seen"))
    with pytest.raises(ConfigError, match="env.goals"):
        settings(env__goals="mixed")


def test_demonstrations_of_webshop(agent):
    config = settings(
        warm_start__episodes="20", warm_start__noise="0.1", warm_start__imitate_noise="no"
    )
    games = Games(config)
    t, own = demonstrate(agent, games, prompter(agent, games, config), config)
    assert t.valid.all() and 0.8 < own.float().mean() < 1
    assert t.won.float().mean() > 0.7
    assert max(t.cu_prompts.diff()) <= config.agent.max_prompt_tokens
    assert sum(e.truncated_prompts for e in t.episodes) == 0


def test_evaluation_gives_scores_and_reachable_goals(agent):
    config = settings(eval__episodes="4", env__max_turns="2", agent__max_response_tokens="4")
    games = Games(config)
    with open_rollouts(agent, games.family, prompter(agent, games, config), config) as rollouts:
        metrics, t = evaluate(rollouts, games, config)
    assert metrics["eval/score"] == 0 and metrics["eval/reachable"] == 1
    assert "score 0.000; over the 100.0% of goals" in format_table(metrics)
    assert games.family.describe_data()["split"] == "test"


def test_scores_over_goals_that_can_be_met():
    episodes = [Episode("", "", won=won, score=score, reachable=reachable) for won, score, reachable in
                [(True, 1.0, True), (False, 0.5, True), (False, 0.2, False)]]  # fmt: skip
    assert summarise_scores("eval", episodes) == pytest.approx(
        {
            "eval/score": 1.7 / 3,
            "eval/reachable": 2 / 3,
            "eval/success_reachable": 0.5,
            "eval/score_reachable": 0.75,
        }
    )
    assert summarise_scores("eval", [Episode("", "")]) == {}
    assert (
        summarise_scores("eval", [Episode("", "", score=0.0, reachable=False)])[
            "eval/success_reachable"
        ]
        == 0
    )


@pytest.mark.parametrize(
    "action, allowed",
    [
        ("click[buy now]", True),
        ("search[tea]", True),
        ("search[<your query>]", True),
        ("search[]", False),
        ("search[tea", False),
        ("click[tea]", False),
        ("", False),
    ],
)
def test_a_search_is_listed_whatever_its_words(action, allowed):
    listed = families.find("webshop")(settings().env).is_listed
    assert listed(action, ["search[<your query>]", "click[buy now]"]) is allowed
    assert not listed("search[tea]", ["click[buy now]"])


@pytest.mark.parametrize(
    "action, near",
    [
        ("'search[tea]'", True),
        ("search[tea].", True),
        ("`click[buy now]`", True),
        ("\u201cclick[buy now]\u201d.", True),
        ("search['tea']", False),  # is listed
        ("click[buy now]", False),
        ("'click[tea]'", False),
        ("'search[]'", False),
        ("", False),
    ],
)
def test_a_search_in_quotes_is_a_near_miss(action, near):
    family = families.find("webshop")(settings().env)
    assert family.is_near_miss(action, ["search[<your query>]", "click[buy now]"]) is near
    assert not family.is_near_miss("'search[tea]'", ["click[buy now]"])


def test_case_is_no_more_than_a_near_miss():
    family = families.find("household")(configure().env)
    assert family.is_near_miss("go to desk 1", ["Go to Desk 1."])
    assert not family.is_near_miss("Go to Desk 1.", ["Go to Desk 1."])


def test_an_episode_has_the_environments_score(agent):
    config = settings()
    games = Games(config)
    env = games.make(1)[0]
    play = Play(env, games.list_panel()[0], games.family, config).begin()
    goal = env.goal
    for action in (
        "search[x]",
        f"search[{goal['name']}]",
        f"click[{goal['asin']}]",
        "click[buy now]",
    ):
        play.step(Answer([], []), f"<action>{action}</action>".encode())
    assert play.over and play.episode.terminated and play.episode.reachable
    assert play.episode.score == play.info["task_score"]
    assert play.episode.rewards[0] == 0 and len(play.episode.rewards) == 4
    assert play.episode.rewards[1] == config.reward.inadmissible, (
        "a search works there, but is not listed"
    )
