"""The fixed panel: each game once, the right figures, the same every time; and the command on a saved checkpoint."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from helpers import configure, make_tiny

from hiper_fast.envs.alfworld.player import Walkthrough
from hiper_fast.envs.family import FIRST_SEEDS, PANEL
from hiper_fast.envs.household import TASK_TYPES, Household
from hiper_fast.eval import evaluate, format_table, main
from hiper_fast.learn.warm_start import write_response
from hiper_fast.options import ConfigError
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Written, open_rollouts
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.runs import checkpoint
from hiper_fast.runs.folder import write_config
from hiper_fast.runs.metrics import wilson


@pytest.fixture(scope="module")
def agent():
    return make_tiny()


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def settings(episodes=7, max_turns=3, name="household", **env):
    config = configure(name, env__max_turns=max_turns)
    config.eval.episodes, config.agent.max_response_tokens = episodes, 6
    for name, value in env.items():
        setattr(config.env, name, value)
    return config


def run(agent, config, **options):
    games = Games(config)
    with open_rollouts(agent, games.family, write(agent, games, config), config) as rollouts:
        return evaluate(rollouts, games, config, **options)


def write(agent, games, config):
    return Prompter(agent.tokenizer, config.agent, games.family.styles["compact"])


def solver(wins):
    """In place of `Sampled`: solves the first `wins` games and looks about in the others."""

    def make(engine, temperature, seed):
        agent, players = engine.agent, {}

        def respond(plays):
            answers = []
            for play in plays:
                if play.number not in players:
                    game = play.env.game
                    players[play.number] = Walkthrough(game.goal, game.walkthrough)
                text = "<action>look</action>"
                if play.number < wins:
                    text = write_response(players[play.number].move([]), play.state.subgoal)
                ids = agent.tokenizer(text, add_special_tokens=False)["input_ids"]
                answers.append(Answer(ids, [0.0] * len(ids)))
            return answers

        return Written(respond)

    return make


# The games.


def test_the_panel_is_unseen_distinct_and_the_same_for_every_seed():
    config = settings(episodes=50)
    panel = [task["seed"] for task in Games(config).list_panel()]
    assert len(set(panel)) == 50 and min(panel) >= PANEL
    config.run.seed = 9
    assert [task["seed"] for task in Games(config).list_panel()] == panel
    config.eval.episodes = 8
    assert [task["seed"] for task in Games(config).list_panel()] == panel[:8], (
        "a smaller panel is part of a larger one"
    )


def test_training_games_depend_on_seed_and_purpose_and_are_none_of_the_panel():
    config = settings()
    games = Games(config)
    first = games.draw("update 1", 40)
    assert first == Games(config).draw("update 1", 40) != games.draw("update 2", 40)
    assert all(0 <= task["seed"] < PANEL for task in first)
    config.run.seed = 1
    assert Games(config).draw("update 1", 40) != first


def test_alfworld_panel_is_the_whole_split_at_most(tmp_path, monkeypatch):
    import json

    from hiper_fast.envs import household

    for split, count in (("train", 2), ("valid_seen", 5)):
        for seed in range(count):
            place = tmp_path / "json_2.1.1" / split / f"game-{seed}" / "trial"
            place.mkdir(parents=True)
            (place / "game.tw-pddl").write_text(
                json.dumps(household.generate(TASK_TYPES[0], seed, "small"))
            )
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    config = settings(episodes=100, name="alfworld")
    panel = [task["options"]["game"] for task in Games(config).list_panel()]
    assert len(panel) == len(set(panel)) == 5
    assert all("valid_seen" in str(game) for game in panel)
    config.eval.episodes = 3
    assert len(Games(config).list_panel()) == 3
    config.env.eval_split = "valid_unseen"
    with pytest.raises(ConfigError, match="valid_unseen"):
        Games(config)


# The figures.


def test_each_game_is_played_exactly_once(agent, monkeypatch):
    seeds, reset = [], Household.reset

    def recorded(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    config = settings()
    monkeypatch.setattr(Household, "reset", recorded)
    metrics, t = run(agent, config)
    seeds.remove(FIRST_SEEDS["test"])  # the one that `Games` tries
    assert sorted(seeds) == [FIRST_SEEDS["test"] + i for i in range(7)]
    assert metrics["eval/episodes"] == len(t.episodes) == 7
    assert metrics["eval/turns"] == t.turns / 7 <= 3


@pytest.mark.parametrize("wins", [0, 5, 9])
def test_success_is_counted_per_game_and_per_type(agent, monkeypatch, wins):
    monkeypatch.setattr("hiper_fast.rollout.play.Sampled", solver(wins))
    metrics, t = run(agent, settings(episodes=9, max_turns=40))
    assert metrics["eval/success"] == pytest.approx(wins / 9)
    assert (metrics["eval/low"], metrics["eval/high"]) == wilson(wins, 9)
    assert [e.won for e in t.episodes] == [True] * wins + [False] * (9 - wins)
    counts = {k.rsplit("/", 1)[1]: v for k, v in metrics.items() if k.startswith("eval/episodes/")}
    assert sum(counts.values()) == 9 and set(counts) <= set(TASK_TYPES)
    won = sum(metrics[f"eval/success/{name}"] * count for name, count in counts.items())
    assert round(won) == wins
    for name, count in counts.items():
        mine = [e.won for e in t.episodes if e.task_type == name]
        assert len(mine) == count and metrics[f"eval/success/{name}"] == pytest.approx(
            sum(mine) / count
        )
        assert metrics[f"eval/won/{name}"] == "".join("1" if won else "0" for won in mine)
    assert metrics["eval/valid_rate"] == pytest.approx(t.valid.float().mean().item())


def test_evaluation_is_deterministic(agent):
    def answers(**options):
        metrics, t = run(agent, settings(episodes=4), **options)
        del metrics["time/eval"]
        return metrics, t.response_ids.tolist()

    first = answers()
    random.random()
    assert answers() == first
    assert answers(seed=1)[1] != first[1]


def test_table_holds_wilson_intervals():
    metrics = {
        "eval/success": 0.6,
        "eval/episodes": 10,
        "eval/success/look_at_obj_in_light": 1.0,
        "eval/episodes/look_at_obj_in_light": 4,
        "eval/success/pick_and_place_simple": 1 / 3,
        "eval/episodes/pick_and_place_simple": 6,
    }
    _, *lines = format_table(metrics).splitlines()
    for line, name, wins, count in zip(
        lines,
        ("look_at_obj_in_light", "pick_and_place_simple", "all"),
        (4, 2, 6),
        (4, 6, 10),
        strict=True,
    ):
        low, high = wilson(wins, count)
        assert line.split()[:3] == [name, str(count), f"{wins / count:.1%}"]
        assert f"{low:.1%} to {high:.1%}" in line
    assert "31.3% to 83.2%" in lines[-1], "6 of 10, as tables of Wilson's interval give it"


# The command.


def write_options(run):
    config = settings(episodes=4)
    config.agent.style, config.run.threads = "compact", 1
    write_config(config, run)


@pytest.fixture(scope="module")
def saved(agent, tmp_path_factory):
    """A checkpoint of a run, with the run's options beside it."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "step-000003"
    agent.model.save_pretrained(folder)
    agent.tokenizer.save_pretrained(folder)
    write_options(run)
    return folder


def test_command_prints_the_table(saved, capsys):
    assert main(["--checkpoint", str(saved)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^all +4 +\d+\.\d% +\d+\.\d% to \d+\.\d%$", out, re.MULTILINE)
    assert main(["--checkpoint", str(saved)]) == 0
    assert capsys.readouterr().out == out


def test_command_plays_what_the_options_say(saved, capsys, monkeypatch):
    monkeypatch.setattr("hiper_fast.rollout.play.Sampled", solver(3))
    argv = ["--checkpoint", str(saved), "--env.max_turns", "40", "--eval.episodes", "5"]
    assert main([*argv, "--env.task_types", "look_at_obj_in_light"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["look_at_obj_in_light", "5", "60.0%"],
        ["all", "5", "60.0%"],
    ]


def test_command_says_what_is_wrong_with_what_it_measures(saved, capsys):
    """An untrained model babbles until it is cut."""
    assert main(["--checkpoint", str(saved), "--eval.episodes", "4"]) == 0
    assert "eval/responses_at_limit" in capsys.readouterr().err


def test_command_takes_a_config_of_its_own_and_any_model_folder(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "own.yaml"
    file.write_text(
        "eval: {episodes: 2}\nenv: {max_turns: 1, name: household}\nagent: {max_response_tokens: 3}\n"
    )
    assert main(["--checkpoint", str(tmp_path / "model"), "--config", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "2"


def test_a_folder_called_tiny_is_no_preset(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", "tiny"]) == 2
    assert "cannot load" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere", "nowhere/checkpoints/step-000001", "/"])
def test_bad_checkpoint(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["--checkpoint", path]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    out, err = capsys.readouterr()
    assert out == "" and path in err and err.count("\n") == 1


def test_a_file_is_no_checkpoint(saved, capsys):
    assert main(["--checkpoint", str(saved / "config.json")]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert main(["--checkpoint", str(tmp_path / "a" / "b")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "a" / "b") in err


@pytest.mark.parametrize(
    "argv", [[], ["--checkpoint"], ["--checkpoint", "x", "--env.sice", "small"]]
)
def test_bad_options(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert ("--checkpoint" if len(argv) < 3 else "did you mean env.size") in capsys.readouterr().err


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert (
        "--checkpoint" in out
        and "--config" in out
        and "--sampling-seed" in out
        and "--env.size" in out
    )


def test_missing_data_is_one_line(saved, capsys):
    assert main(["--checkpoint", str(saved), "--env", "alfworld"]) == 2
    err = capsys.readouterr().err
    assert "ALFWORLD_DATA" in err and err.count("\n") == 1


# Runs, several checkpoints, several seeds, and what is kept of them.


@pytest.fixture(scope="module")
def run_of_two(agent, tmp_path_factory):
    """A run of two checkpoints, the first of them the best."""
    run = tmp_path_factory.mktemp("runs") / "two"
    for step, improved in ((1, True), (2, False)):
        checkpoint.save(
            run / "checkpoints", step, policy=agent.model, tokenizer=agent.tokenizer, critic=None,
            optimizers={}, state={}, improved=improved,
        )  # fmt: skip
    write_options(run)
    return run


def test_of_a_run_the_best_checkpoint_is_taken_and_named(run_of_two, capsys):
    assert main(["--checkpoint", str(run_of_two)]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first == f"{run_of_two}: step-000001, its best checkpoint"
    assert main(["--checkpoint", str(run_of_two / "checkpoints" / "step-000001")]) == 0
    assert capsys.readouterr().out.splitlines() == table


def test_of_a_run_without_a_best_the_newest_is_taken(run_of_two, tmp_path, capsys):
    run = shutil.copytree(run_of_two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000001")
    for file in run.glob("checkpoints/*/state.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"best": None}))
    assert main(["--checkpoint", str(run)]) == 0
    assert "step-000002, its newest checkpoint" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints" / "step-000002")
    assert main(["--checkpoint", str(run)]) == 2
    assert f"{run} is a run without a checkpoint yet" in capsys.readouterr().err


def test_every_episode_is_kept(run_of_two, tmp_path, capsys):
    file = tmp_path / "all.json"
    argv = ["--checkpoint", str(run_of_two), "--sampling-seed", "0,7", "--json", str(file)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    path = str(run_of_two / "checkpoints" / "step-000001")
    kept = json.loads(file.read_text())
    rows = kept["episodes"]
    assert len(rows) == 8 and all(row["checkpoint"] == path for row in rows)
    assert [row["sampling_seed"] for row in rows] == [0] * 4 + [7] * 4
    seeds = [{"seed": FIRST_SEEDS["test"] + i} for i in range(4)]
    assert [row["game"] for row in rows] == seeds * 2
    for row in rows:
        assert row["type"] in TASK_TYPES and type(row["won"]) is bool and row["score"] is None
        assert 1 <= row["turns"] <= 3
    for result, part in zip(kept["results"], (rows[:4], rows[4:]), strict=True):
        assert result["success"] == sum(row["won"] for row in part) / 4 and result["games"] == 4
        assert f"{path}, sampling seed {result['sampling_seed']}" in out
    assert kept["pooled"][-1]["name"] == "all" and kept["panel"]["environment"] == "household"
    env = Household()
    _, info = env.reset(**rows[2]["game"])
    assert info["task_type"] == rows[2]["type"], "the row's game can be played again"


def test_several_checkpoints_get_a_row_each_and_are_pooled_over_games(
    run_of_two, capsys, monkeypatch
):
    monkeypatch.setattr("hiper_fast.rollout.play.Sampled", solver(3))
    paths = [str(run_of_two / "checkpoints" / f"step-{step:06d}") for step in (1, 2)]
    assert main(["--checkpoint", *paths, "--env.max_turns", "40"]) == 0
    header, first, second, blank, title, *types, total = capsys.readouterr().out.splitlines()
    assert "checkpoint" in header and "pooled" in title and blank == ""
    low, high = wilson(3, 4)
    for line, path in zip((first, second), paths, strict=True):
        assert line.startswith(f"{path}, sampling seed 0 ")
        assert line.endswith(f"4    75.0%   {low:.1%} to {high:.1%}")
    assert total.split() == ["all", "4", "75.0%", f"{low:.1%}", "to", f"{high:.1%}"], (
        "the same games won twice tell no more than once"
    )


def test_other_games_are_not_pooled(run_of_two, tmp_path, capsys):
    other = shutil.copytree(run_of_two, tmp_path / "other")
    config = settings(episodes=4, size="medium")
    config.agent.style, config.run.threads = "compact", 1
    write_config(config, other)
    file = tmp_path / "all.json"
    assert main(["--checkpoint", str(run_of_two), str(other), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Not pooled: they played different games." in out and "task type" not in out
    assert json.loads(file.read_text())["pooled"] is None


def test_a_file_is_written_whole_or_not_at_all(run_of_two, tmp_path, capsys, monkeypatch):
    file = tmp_path / "all.json"
    file.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["--checkpoint", str(run_of_two), "--json", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "No space left" in err and "Traceback" not in err and "task type" in out
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"] and file.read_text() == "old"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ["--sampling-seed", "x"],
            "--sampling-seed: expected whole numbers from 0 on (0,1,2), got 'x'",
        ),
        (["--sampling-seed", "-1"], "--sampling-seed"),
        (["--sampling-seed", "0,,1"], "--sampling-seed"),
        (["--sampling-seed", "1,0,01"], "--sampling-seed: each of them once"),
        (["--sampling-seed", "9" * 5000], "--sampling-seed"),
        (["--json", "nowhere/all.json"], "--json: there is no folder"),
    ],
)
def test_what_is_asked_wrongly_is_named(run_of_two, capsys, options, named):
    try:
        assert main(["--checkpoint", str(run_of_two), *options]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and "Traceback" not in err
