"""Playing in the terminal: a person, a checkpoint, and what goes wrong."""

import io
import json
import shutil

import pytest
from helpers import configure, make_tiny

from hiper_fast.play import main
from hiper_fast.runs import checkpoint
from hiper_fast.runs.folder import write_config


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def play(monkeypatch, capsys):
    """Plays with `typed` on stdin: (status, what was shown, what went to stderr)."""

    def run(*arguments, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with a checkpoint of the untrained tiny model."""
    folder = tmp_path_factory.mktemp("run")
    write_config(configure(agent__style="compact", env__max_turns=3), folder)
    agent = make_tiny()
    checkpoint.save(
        folder / "checkpoints", 0, policy=agent.model, tokenizer=agent.tokenizer, critic=agent.add_critic(),
        optimizers={}, state={},
    )  # fmt: skip
    return folder


# A person.


def test_a_person_wins_a_household_game_by_commands_and_numbers(play):
    from hiper_fast.envs.household import Household

    env = Household("small")
    _, info = env.reset(seed=3)
    lines = []
    for i, command in enumerate(env.content["walkthrough"]):
        lines.append(command if i % 2 else str(info["admissible_commands"].index(command) + 1))
        info = env.step(command)[-1]
    status, shown, err = play("household", "--game", 3, typed="\n".join(lines) + "\n")
    assert status == 0 and not err
    assert info["task"] in shown and f"Won after {len(lines)} turns." in shown


def test_a_person_shops(play):
    typed = "search[kettle]\nclick[next >]\nclick[< prev]\nclick[nowhere]\n3\nclick[buy now]\n"
    status, shown, _ = play("webshop", "--seed", 5, typed=typed)
    assert status == 0
    assert "Page 2" in shown and "search[<your query>]" in shown
    assert "after 6 turns, score 0." in shown


@pytest.mark.parametrize("typed", ["", "look\n", "q\n", "look\nQUIT\n", "\n\n"])
def test_leaving_is_quiet(play, typed):
    status, shown, err = play("household", typed=typed)
    assert status == 0 and not err and "after" not in shown


def test_ctrl_c_is_quiet(play, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    status, _, err = play("webshop")
    assert status == 0 and not err


@pytest.mark.parametrize("typed", ["[bold]x[/]\n", "</action><action>look\n", "\x00é漢\ud800\n"])
def test_any_text_is_a_command(play, typed):
    assert play("household", typed=typed)[0] == 0
    assert play("webshop", typed=typed)[0] == 0


def test_the_seed_draws_the_game_and_a_number_names_one(play):
    assert (
        play("webshop", "--seed", 1)[1]
        == play("webshop", "--seed", 1)[1]
        != play("webshop", "--seed", 2)[1]
    )
    assert play("webshop", "--game", 7)[1] != play("webshop", "--game", 8)[1]


@pytest.mark.parametrize("typed", ["0", "99", "-1", "+3", "9" * 5000])
def test_a_number_that_no_command_has_costs_no_turn(play, typed):
    status, shown, err = play("household", typed=f"{typed}\n")
    assert status == 0 and not err
    assert "they have numbers from 1 to" in shown and "turn 2" not in shown


def test_no_word_is_cut_in_a_narrow_terminal(play, run_folder, monkeypatch):
    from hiper_fast.envs.household import Household

    env = Household("small")
    _, info = env.reset(seed=0)
    for width in (16, 30, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        _, shown, _ = play("household", typed="antidisestablishmentarianism\n")
        assert "…" not in shown
        for word in {word for command in info["admissible_commands"] for word in command.split()}:
            assert word in shown, word
    monkeypatch.setenv("COLUMNS", "40")
    path = run_folder / "checkpoints" / "step-000000"
    _, shown, _ = play("household", "--checkpoint", path, "--auto")
    assert "…" not in shown and "decision" in shown and "V switch" in shown


# Demonstrations.


def solve(seed):
    """The commands that win a game."""
    from hiper_fast.envs.household import Household

    env = Household("small")
    env.reset(seed=seed)
    return env.content["walkthrough"]


def test_games_that_a_person_plays_become_demonstrations(play, tmp_path):
    file = tmp_path / "mine.jsonl"
    for seed in (3, 4):
        first, *rest = solve(seed)
        typed = "\n".join([first, "subgoal: look about", first, "Subgoal:solve it", *rest])
        status, shown, err = play("household", "--game", seed, "--record", file, typed=typed + "\n")
        assert status == 0 and not err
        assert "Say first what it is for" in shown and f"Won after {1 + len(rest)} turns." in shown
        assert f"Recorded in {file}." in shown.replace("\n", " ") or str(file) in shown.replace(
            "\n", ""
        )
    one, two = map(json.loads, file.read_text().splitlines())
    assert (one["env"], one["game"], two["game"]) == ("household", {"seed": 3}, {"seed": 4})
    assert one["won"] and [turn["action"] for turn in one["turns"]] == list(solve(3))
    assert [turn["subgoal"] for turn in one["turns"][:3]] == ["look about", "solve it", "solve it"]
    assert [turn["switch"] for turn in one["turns"][:3]] == [True, True, False]


def test_what_would_break_the_format_is_no_demonstration(play, tmp_path):
    file = tmp_path / "mine.jsonl"
    typed = "subgoal: go</subgoal>\nlook\nsubgoal: go\n</action>\n看\n"
    status, shown, _ = play("household", "--record", file, typed=typed)
    assert status == 0 and shown.count("has tags or Chinese characters") == 3
    assert "Not recorded" in shown and not file.exists() and "turn 2" not in shown


# A checkpoint.


def test_a_checkpoint_plays_with_its_values_beside_the_page(play, run_folder):
    path = run_folder / "checkpoints" / "step-000000"
    status, shown, _ = play("household", "--checkpoint", path, "--auto")
    assert status == 0 and "Out of turns after 3 turns." in shown, "the turn limit is the run's"
    for label in ("agent", "decision", "subgoal", "action", "V low", "V high", "V switch"):
        assert shown.count(label) >= 3
    assert play("household", "--checkpoint", path, "--auto")[1] == shown, (
        "the same seed says the same"
    )


def test_a_person_may_overrule_it(play, run_folder):
    path = run_folder / "checkpoints" / "step-000000"
    status, shown, _ = play("household", "--checkpoint", path, typed="inventory\n\n")
    assert status == 0 and "You are not carrying anything." in shown and "Out of turns" not in shown


def test_a_conversation_goes_on_after_a_word_of_the_persons_and_ends_where_its_room_does(
    play, run_folder
):
    path = run_folder / "checkpoints" / "step-000000"
    options = ["--agent.style", "transcript", "--agent.max_prompt_tokens", 4000]
    status, shown, _ = play("household", "--checkpoint", path, *options, typed="inventory\n\n\n")
    assert (
        status == 0
        and "You are not carrying anything." in shown
        and "Out of turns after 3 turns." in shown
    )
    assert shown.count("V low") == 3
    options[-1] = 340
    status, shown, _ = play("household", "--checkpoint", path, "--auto", *options)
    assert status == 0 and "Out of room for the conversation after 1 turns." in shown


def test_a_plain_model_folder_has_no_values(play, run_folder, tmp_path):
    path = shutil.copytree(
        run_folder / "checkpoints" / "step-000000", tmp_path / "a" / "b" / "model"
    )
    (path / "critic.safetensors").unlink()
    options = ["--agent.style", "compact", "--agent.max_response_tokens", 3, "--env.max_turns", 1]
    status, shown, _ = play("household", "--checkpoint", path, "--auto", *options)
    assert status == 0 and "decision" in shown and "V low" not in shown


# What goes wrong.


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["chess"], "chess"),
        (["household", "--checkpoint", "nowhere"], "no folder nowhere"),
        (["household", "--game", "x"], "games have numbers from 0 on, got 'x'"),
        (["webshop", "--game", "999999"], "no goal 999999"),
        (["webshop", "--env.data", "nowhere"], "nowhere"),
        (["household", "--seed", "-1"], "--seed"),
        (
            ["household", "--record", "mine.json"],
            "--record: a file of demonstrations ends in .jsonl",
        ),
        (["household", "--record", "nowhere/mine.jsonl"], "--record: there is no folder"),
        (
            ["household", "--record", "a.jsonl", "--checkpoint", "/"],
            "--record: keeps what a person",
        ),
        (["household", "--seed", "x"], "--seed"),
        (["household", "--temperature", "-1"], "--temperature"),
        (["household", "--env.sise", "small"], "env.size"),
        (["alfworld"], "ALFWORLD_DATA"),
    ],
)
def test_mistakes_are_named(play, arguments, named):
    status, _, err = play(*arguments)
    assert status == 2 and named in err and "Traceback" not in err


def test_help(play):
    status, shown, _ = play("--help")
    assert status == 0 and all(
        name in shown for name in ("--checkpoint", "--seed", "--game", "webshop")
    )
