"""The model card: its header as the Hub reads it, its figures by hand, and when it is written."""

import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import configure, make_tiny
from huggingface_hub import ModelCard

from hiper_fast.runs import checkpoint, model_card
from hiper_fast.runs.checkpoint import CheckpointError

ROWS = [
    {"step": 40, "stage": "warm_start", "loss/imitation": 0.2},
    {"step": 0, "stage": "eval", "eval/success": 0.25, "eval/episodes": 4},
    {"step": 1, "stage": "train", "rollout/turns": 7.5, "episodes": 8},
    {"step": 2, "stage": "train", "rollout/turns": 5.25, "episodes": 16},
    {
        "step": 2, "stage": "eval", "eval/success": 96 / 411, "eval/episodes": 411,
        "eval/success/pick|<b>": 81 / 263, "eval/episodes/pick|<b>": 263,
        "eval/success/heat": 15 / 148, "eval/episodes/heat": 148,
    },
    {"step": 3, "stage": "train", "rollout/turns": 100.0, "episodes": 24},
]  # fmt: skip


@pytest.fixture(scope="module")
def agent():
    return make_tiny()


def build(agent, step=2, rows=ROWS, data=None, **options):
    config = configure(**{"run__name": "trial", "train__updates": 24, "run__seed": 7, **options})
    return model_card.build(config, step, rows, agent.model, data or {})


def take_table(card, heading):
    """The cells of the lines of a section's table."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].replace("\\|", "¦").split("|")] for line in lines]


def test_the_header_is_what_the_hub_reads(agent):
    header = ModelCard(build(agent)).data.to_dict()
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hiper_fast", "hiper", "reinforcement-learning", "household"],
    }, "no base model, and no license made up"
    big = {"model__path": "Qwen/Qwen2.5-1.5B-Instruct", "model__lora_rank": 8}
    header = ModelCard(build(agent, **big)).data.to_dict()
    assert header["library_name"] == "peft" and "license" not in header
    assert header["base_model"] == "Qwen/Qwen2.5-1.5B-Instruct"


def test_a_folder_is_no_base_model_of_the_hub(agent, tmp_path):
    card = build(agent, model__path=str(tmp_path / "mine"))
    assert "base_model" in yaml.safe_load(card.split("---")[1]), "no such folder: a hub id"
    (tmp_path / "mine").mkdir()
    card = build(agent, model__path=str(tmp_path / "mine"))
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert str(tmp_path) not in card and "mine (Qwen3ForCausalLM)" in card


def test_what_it_is_and_how_it_was_trained(agent):
    what = dict(take_table(build(agent), "What it is")[1:])
    assert what["model"].startswith("tiny") and "Qwen3ForCausalLM" in what["model"]
    assert what["parameters"] == f"{agent.model.num_parameters():,}"
    assert what["environment"].startswith("household: max turns 10, ")
    training = dict(take_table(build(agent, data={"shop": "v2"}), "How it was trained")[1:])
    # 8 episodes of 7.5 turns and 8 of 5.25; the third update is after this checkpoint.
    assert training["so far"] == "2 of 24 updates, 16 episodes, 102 turns"
    assert training["estimator"].startswith("hae, gamma 0.98") and training["seed"] == "7"
    assert "9,000 scripted episodes" in training["warm start"] and training["data"] == "shop v2"
    assert all(name in training["made with"] for name in ("hiper_fast", "torch", "transformers"))
    none = dict(take_table(build(agent, warm_start__enabled="no"), "How it was trained")[1:])
    assert none["warm start"] == "none" and "data" not in none


def test_results_have_published_wilson_intervals(agent):
    card = build(agent)
    _, *lines = take_table(card, "Results")
    assert lines == [  # Newcombe (1998), as in test_metrics.py
        ["pick¦&lt;b>", "263", "30.8%", "25.5% to 36.6%"],
        ["heat", "148", "10.1%", "6.2% to 16.0%"],
        ["all", "411", "23.4%", "19.5% to 27.7%"],
    ]
    assert "At this update, on the fixed panel of 411 games" in card
    later = build(agent, step=3)
    assert "At update 2, the last evaluated, on" in later and "124 turns" not in later
    assert "4 games" in build(agent, step=1), "what came later is not this checkpoint's"
    assert "Not evaluated yet." in build(agent, rows=ROWS[:1])


def test_limits_say_what_the_run_warned_of(agent):
    bad = [
        {"step": step, "stage": "train", "rollout/turns": 9.0, "episodes": 8 * step,
         "rollout/switch_rate": 1.0 if step < 20 else 0.5}
        for step in range(1, 30)
    ]  # fmt: skip
    text = "the run had a warning: rollout/switch_rate is 1, above 0.9 since update 1: "
    assert text in build(agent, step=10, rows=bad)
    assert text not in build(agent, step=2, rows=bad) and text not in build(
        agent, step=29, rows=bad
    )


def test_the_same_rows_give_the_same_card(agent):
    assert build(agent) == build(agent, rows=[dict(row) for row in ROWS])


@pytest.mark.parametrize("name", ["$name", "a `b` | c", "---"])
def test_odd_names_break_nothing(agent, name):
    card = build(agent, run__name=name)
    assert ModelCard(card).data.to_dict()["library_name"] == "transformers"
    assert f"# {name}, update 2" in card


def test_the_commit_is_that_of_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "hiper_fast" / "__init__.py"
    monkeypatch.setattr(model_card.hiper_fast, "__file__", str(package))
    assert model_card.find_commit() is None, "not a checkout"
    (tmp_path / ".git").mkdir()
    assert model_card.find_commit() is None, "git cannot read it"
    (tmp_path / ".git").rmdir()

    def git(*arguments):
        identity = "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    package.parent.mkdir()
    package.write_text("")
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "v1")
    assert model_card.find_commit() == git("rev-parse", "HEAD")
    package.write_text("x = 1\n")
    assert model_card.find_commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert model_card.find_commit() is None, "no git"


def save(folder, agent, step, **options):
    return checkpoint.save(
        folder, step, policy=agent.model, tokenizer=agent.tokenizer, critic=None,
        optimizers={}, state={}, **options,
    )  # fmt: skip


def test_texts_are_as_whole_as_the_checkpoint(agent, tmp_path, monkeypatch):
    path = save(tmp_path, agent, 1, texts={"README.md": "ä card"})
    assert (path / "README.md").read_text(encoding="utf-8") == "ä card"
    write = Path.write_text

    def fill_disk(self, *arguments, **options):
        if self.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(CheckpointError, match="untouched"):
        save(tmp_path, agent, 2, texts={"README.md": "another"})
    assert [file.name for file in tmp_path.iterdir()] == ["step-000001"]
    assert (path / "README.md").read_text(encoding="utf-8") == "ä card"


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ("search", "9,000 scripted episodes imitated"),
        ("a/mine.jsonl", "episodes of a/mine.jsonl imitated"),
    ],
)
def test_what_was_imitated_is_named(shown, told):
    config = configure(warm_start__demonstrations=shown)
    assert told in model_card.describe_training(config, 0, [], {})["warm start"]
