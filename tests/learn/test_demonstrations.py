"""Demonstrations of one's own: what a file holds, what is wrong with it, and what models learn from it."""

import io
import json

import pytest
import torch
from helpers import configure, make_tiny

from hiper_fast import play, train
from hiper_fast.envs.family import FIRST_SEEDS, families
from hiper_fast.learn import warm_start
from hiper_fast.learn.demonstrations import read_demonstrations, record_episode
from hiper_fast.learn.warm_start import imitate, replay
from hiper_fast.options import ConfigError
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.runs.metrics import read_metrics


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
        monkeypatch.delenv(name, raising=False)


def settings(file, name="household", **options):
    given = {
        "warm_start__demonstrations": str(file),
        "env__max_turns": 30,
        "agent__max_prompt_tokens": 4000,
    }
    return configure(name, **given | options)


def prepare(config):
    games = Games(config)
    agent = make_tiny(families.find(config.env.name))
    return (
        agent,
        games,
        Prompter(agent.tokenizer, config.agent, games.family.styles[config.agent.style]),
    )


def record_scripted(config, file, monkeypatch):
    """The scripted players' episodes: in a file, and as they were shown."""
    plays = []

    class Remembered(Play):
        def __init__(self, env, task, family, config):
            super().__init__(env, task, family, config)
            plays.append((self, task))

    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "Play", Remembered)
        shown, _ = warm_start.demonstrate(*prepare(config), config)
    for one, task in plays:
        record_episode(file, one, task)
    return shown


@pytest.mark.parametrize("style", ["compact", "reference", "transcript"])
@pytest.mark.parametrize("name", ["household", "webshop"])
def test_recorded_episodes_are_shown_token_for_token(tmp_path, monkeypatch, name, style):
    file = tmp_path / "mine.jsonl"
    options = {"agent__style": style, "agent__max_prompt_tokens": 20000}
    scripted = settings("search", name, warm_start__episodes=6, warm_start__noise=0.2, **options)
    shown = record_scripted(scripted, file, monkeypatch)
    config = settings(file, name, **options)
    again, weights = replay(*prepare(config), config)
    for field in ("prompt_ids", "response_ids", "roles", "switch", "rewards", "won", "final_ids"):
        assert torch.equal(getattr(again, field), getattr(shown, field)), field
    assert (weights == 1).all() and len(weights) == shown.turns


def test_what_a_person_plays_warms_a_model_up(tmp_path, monkeypatch, capsys):
    """play -> file -> warm start, of the tiny model and of one that was trained before."""
    file = tmp_path / "mine.jsonl"
    for seed in range(3):
        env = families.find("household").environment("small")
        env.reset(seed=seed)
        lines = ["subgoal: solve it", *env.content["walkthrough"]]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert play.main(["household", "--game", str(seed), "--record", str(file)]) == 0
    options = [
        "--warm_start.demonstrations",
        str(file),
        "--warm_start.epochs",
        "20",
        "--updates",
        "0",
    ]
    options += ["--eval.episodes", "2", "--run.folder", str(tmp_path), "--run.display", "plain"]
    options += ["--env.max_turns", "20", "--model.device", "cpu", "--run.threads", "1"]
    assert train.main([*options, "--name", "first"]) == 0
    assert "3 episodes shown" in capsys.readouterr().out
    checkpoint = str(tmp_path / "first" / "checkpoints" / "step-000000")
    pretrained = ["--model", checkpoint, "--warm_start.enabled", "yes", "--agent.style", "compact"]
    assert train.main([*options, *pretrained, "--name", "second"]) == 0
    first, second = (
        [
            row
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
            if row["stage"] == "warm_start"
        ]
        for name in ("first", "second")
    )
    assert first[-1]["warm_start/accuracy"] > 0.9 > first[0]["warm_start/accuracy"]
    assert second[0]["warm_start/accuracy"] > 0.9, "it goes on from what it knew"
    assert "warm_start/teacher" not in first[-1]


GOOD = {
    "env": "household",
    "game": {"seed": 3},
    "turns": [
        {"subgoal": "find it", "action": "look"},
        {"action": "inventory", "switch": False},
        {"subgoal": "find it", "switch": True, "action": "look"},
    ],
}


def write(file, *episodes):
    file.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return settings(file)


def change(**changes):
    return GOOD | changes


def turns(**changes):
    return {"turns": [GOOD["turns"][0], GOOD["turns"][1] | changes]}


def test_a_turn_may_leave_out_what_is_plain(tmp_path):
    config = write(tmp_path / "mine.jsonl", GOOD)
    t, _ = replay(*prepare(config), config)
    said = [turn.response for turn in t.episodes[0].turns]
    blocks = "<subgoal>find it</subgoal><action>look</action>"
    assert said[0] == said[2] == f"<switch>SWITCH</switch>{blocks}"
    assert said[1].startswith("<switch>KEEP</switch><subgoal>find it</subgoal>")
    assert t.switch.tolist() == [True, False, True] and t.valid.all()
    assert not t.terminated.any(), "it ends where the file does"


def test_without_subgoals_actions_are_enough(tmp_path):
    file = tmp_path / "mine.jsonl"
    write(file, change(turns=[{"action": "look"}]))
    config = settings(file, agent__subgoals=False)
    t, _ = replay(*prepare(config), config)
    assert t.episodes[0].turns[0].response == "<action>look</action>" and t.valid.all()


def test_weights_count(tmp_path):
    """A heavier episode pulls more; alone its weight makes no difference."""
    other = change(game={"seed": 5}, turns=[{"subgoal": "wait", "action": "inventory"}])
    losses = []
    for weight in (1.0, 3.0):
        config = write(tmp_path / "mine.jsonl", GOOD | {"weight": weight}, other)
        agent, *rest = prepare(config)
        t, weights = replay(agent, *rest, config)
        assert weights.mean().item() == pytest.approx(1)
        assert weights[0] / weights[-1] == weight
        losses.append(next(imitate(agent, t, weights, config)).loss)
    assert losses[0] != losses[1]


BROKEN = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "[]": "an episode is a JSON object, not list",
    "3": "an episode is a JSON object, not int",
    "{}": "env: it was played in None",
    json.dumps(
        change(env="webshop")
    ): "env: it was played in 'webshop', and this run plays 'household'",
    json.dumps(change(wieght=1)): "unknown key 'wieght'; did you mean weight?",
    json.dumps(change(game=3)): "game: expected what reset takes",
    json.dumps(change(game={})): "game: expected what reset takes",
    json.dumps(change(game={"seed": "3"})): "game: its seed is a whole number",
    json.dumps(change(game={"seed": True})): "game: its seed is a whole number",
    json.dumps(change(weight=0)): "weight: above 0 and at most 1e+06, got 0",
    json.dumps(change(weight="2")): "weight: expected a number, got '2'",
    json.dumps(change(weight=1e999)): "weight: above 0 and at most 1e+06, got inf",
    json.dumps(change(weight=10**400)): "weight: above 0 and at most 1e+06, got 1000",
    json.dumps(change(env=["x" * 9000])): "env: it was played in ['xxx",
    json.dumps(change(task=3)): "task: expected text, got int",
    json.dumps(change(turns=[])): "turns: expected a list of at least one turn",
    json.dumps(change(turns="look")): "turns: expected a list",
    json.dumps(change(turns=[3])): "turn 1: a turn is a JSON object, not int",
    json.dumps(
        change(turns=[{"action": "look"}])
    ): "turn 1: it has no subgoal, and none has been named",
    json.dumps(change(**turns(action=" "))): "turn 2: it has no action",
    json.dumps(change(**turns(action=None))): "turn 2: it has no action",
    json.dumps(change(**turns(action=["look"]))): "turn 2: action: expected text, got list",
    json.dumps(change(**turns(acton="look"))): "turn 2: unknown key 'acton'; did you mean action?",
    json.dumps(change(**turns(switch="no"))): "turn 2: switch: expected true or false, got 'no'",
    json.dumps(
        change(**turns(subgoal="other"))
    ): "switch: false keeps the subgoal, but that is 'find it'",
    json.dumps(change(**turns(action="</action>look"))): "turn 2: its subgoal or action has tags",
    json.dumps(change(**turns(action="看"))): "turn 2: its subgoal or action has tags or Chinese",
    json.dumps(change(**turns(action="\ud800"))): "turn 2: action: half of a character",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:60])
def test_a_broken_line_is_named(tmp_path, line):
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_demonstrations(settings(file))
    message = str(caught.value)
    assert (
        message.startswith(f"warm_start.demonstrations: {file}, line 3: ") and "\n" not in message
    )
    assert BROKEN[line] in message and len(message) < 400


def test_more_broken_lines_are_counted(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("{\n{}\n3\n")
    with pytest.raises(ConfigError, match=r"line 1: .* \(2 more lines are broken\)"):
        read_demonstrations(settings(file))


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff"])
def test_a_file_that_is_missing_or_empty_or_no_text(tmp_path, content):
    file = tmp_path / "mine.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        ConfigError, match="warm_start.demonstrations: .*(cannot be read|no episode)"
    ):
        read_demonstrations(settings(file))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"task": "fly to the moon"}, "task: that of the game is '.*', not 'fly to the moon'"),
        (
            turns(observation="You see a moon."),
            "turn 2: the game shows '.*', not 'You see a moon.'",
        ),
        ({"game": {"seed": FIRST_SEEDS["test"]}}, "game: the run is evaluated on it"),
        ({"game": {"options": {"goal": 3}, "seed": -(10**30)}}, "game: it cannot be begun"),
    ],
)
def test_a_game_that_is_another_one_is_named(tmp_path, changes, wrong):
    config = write(tmp_path / "mine.jsonl", GOOD, change(**changes))
    with pytest.raises(ConfigError, match=f"mine.jsonl, line 2: {wrong}"):
        replay(*prepare(config), config)


def test_turns_after_the_end_are_named(tmp_path, monkeypatch):
    env = families.find("household").environment("small")
    env.reset(seed=3)
    actions = [*env.content["walkthrough"], "look"]
    config = write(
        tmp_path / "mine.jsonl", change(turns=[{"subgoal": "win", "action": a} for a in actions])
    )
    with pytest.raises(
        ConfigError, match=f"line 1: turn {len(actions)}: the game was over before it"
    ):
        replay(*prepare(config), config)


def test_the_limit_of_turns_cuts_a_demonstration(tmp_path):
    file = tmp_path / "mine.jsonl"
    write(file, GOOD)
    config = settings(file, env__max_turns=2)
    t, _ = replay(*prepare(config), config)
    assert t.turns == 2 and not t.terminated.any()


def test_a_broken_file_stops_a_run_before_anything_is_loaded(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("{\n")
    argv = ["--warm_start.demonstrations", str(file), "--run.folder", str(tmp_path / "runs")]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert f"{file}, line 1: not JSON" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_no_player_and_no_file():
    with pytest.raises(
        ConfigError, match="warm_start.demonstrations: 'serch' is none of .* search"
    ):
        settings("serch")
