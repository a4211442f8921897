"""Whole runs, as small as they go: what they leave behind, how they resume, and how they fail."""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import HOUSEHOLD, make_tiny

from hiper_fast import eval as evaluation
from hiper_fast import train
from hiper_fast.agent import tiny
from hiper_fast.configure import resolve
from hiper_fast.envs import household
from hiper_fast.runs import checkpoint, viewer
from hiper_fast.runs.metrics import read_metrics

SMALL = {
    "env": "household",
    "updates": 5,
    "train.episodes": 4,
    "train.critic_updates": 1,
    "train.minibatches": 2,
    "env.max_turns": 4,
    "agent.max_response_tokens": 8,
    "warm_start.episodes": 6,
    "warm_start.epochs": 1,
    "warm_start.batch_turns": 8,
    "eval.episodes": 5,
    "eval.every": 2,
    "run.save_every": 2,
    "run.keep": 2,
    "run.display": "none",
    "run.threads": 1,
}


def arguments(folder, **options):
    """The command line of a small run under `folder`; dots of an option are written as two underscores."""
    options = SMALL | {key.replace("__", "."): value for key, value in options.items()}
    return [f"--run.folder={folder}", *(f"--{key}={value}" for key, value in options.items())]


def rows(run, *, times=False):
    """The rows of metrics.jsonl, without what the clock says."""
    kept = read_metrics(run / "metrics.jsonl")
    return (
        kept
        if times
        else [{k: v for k, v in row.items() if not k.startswith("time/")} for row in kept]
    )


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """A run sets threads and denormals for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    assert train.main(arguments(folder, name="whole")) == 0
    return folder / "whole"


# What a run leaves behind.


def test_config_is_written_resolved_and_reads_back(finished):
    written = resolve([finished / "config.yaml"])
    assert written.train.updates == 5 and written.env.name == "household"
    assert written.agent.style == "compact", "auto would mean another style for a saved checkpoint"


TRAIN_KEYS = {
    *(
        "rollout/success",
        "rollout/reward",
        "rollout/turns",
        "rollout/segment_length",
        "rollout/switch_rate",
    ),
    *(
        "rollout/valid_rate",
        "rollout/near_miss_rate",
        "rollout/prompt_tokens",
        "rollout/response_tokens",
        "rollout/truncated_prompts",
        "rollout/responses_at_limit",
    ),
    *(
        "loss/policy",
        "loss/value",
        "loss/kl",
        "loss/entropy",
        "loss/clip_fraction",
        "optim/grad_norm",
    ),
    *(
        "optim/skipped_steps",
        "scoring/shared_tokens",
        "update/shared_tokens",
        "time/rollout",
        "time/advantages",
        "time/update",
        "time/total",
        "episodes",
    ),
}
EVAL_KEYS = {
    *(
        "eval/success",
        "eval/low",
        "eval/high",
        "eval/episodes",
        "eval/turns",
        "eval/valid_rate",
        "eval/truncated_prompts",
        "eval/responses_at_limit",
        "time/eval",
    ),
}


def test_metrics_have_every_key(finished):
    by_stage = {}
    for row in rows(finished, times=True):
        by_stage.setdefault(row["stage"], []).append(row)
    assert list(by_stage) == ["warm_start", "eval", "train"]
    assert [row["step"] for row in by_stage["train"]] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in by_stage["eval"]] == [0, 2, 4, 5], (
        "the first and the last state always"
    )
    for row in by_stage["train"]:
        assert TRAIN_KEYS <= row.keys()
        assert all(
            isinstance(row[key], int | float) and math.isfinite(row[key]) for key in TRAIN_KEYS
        )
        assert row["episodes"] == 4 * row["step"] and row["rollout/turns"] <= 4
    for row in by_stage["eval"]:
        assert EVAL_KEYS <= row.keys() and row["eval/episodes"] == 5
        counts = [value for key, value in row.items() if key.startswith("eval/episodes/")]
        assert sum(counts) == 5
    for row in by_stage["warm_start"]:
        assert {"loss/imitation", "warm_start/accuracy", "time/total"} <= row.keys()
    assert (
        by_stage["warm_start"][-1]["loss/imitation"] < by_stage["warm_start"][0]["loss/imitation"]
    )


def test_the_critic_trains_alone_at_first(finished):
    first, second = [row for row in rows(finished) if row["stage"] == "train"][:2]
    assert first["loss/policy"] == 0 and first["loss/value"] > 0
    assert second["loss/entropy"] > 0


def test_tensorboard_has_the_curves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    train_rows = [row for row in rows(finished) if row["stage"] == "train"]
    points = events.Scalars("loss/value")
    assert [p.step for p in points] == [1, 2, 3, 4, 5]
    assert [p.value for p in points] == pytest.approx(
        [row["loss/value"] for row in train_rows], rel=1e-5
    )
    assert [p.step for p in events.Scalars("eval/success")] == [0, 2, 4, 5]


def test_checkpoints_load_with_transformers(finished):
    from transformers import AutoModelForCausalLM

    checkpoints = finished / "checkpoints"
    kept = sorted(path.name for path in checkpoints.glob("step-*"))
    best = checkpoint.best(checkpoints)
    assert {"step-000004", "step-000005", best.name} == set(kept)
    assert checkpoint.latest(checkpoints).name == "step-000005"
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "step-000005")
    agent = make_tiny(path=str(checkpoints / "step-000005"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), agent.model.parameters(), strict=True)
    )
    text = "<switch>SWITCH</switch><subgoal>find soapbar</subgoal>"
    assert (
        agent.tokenizer(text)["input_ids"]
        == tiny.load_tokenizer(HOUSEHOLD.tokenizer)(text)["input_ids"]
    )
    start = tiny.build_model(tiny.load_tokenizer(HOUSEHOLD.tokenizer), seed=0)
    assert not all(
        torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )


def test_the_best_checkpoint_is_one_that_was_evaluated_best(finished):
    success = {row["step"]: row["eval/success"] for row in rows(finished) if row["stage"] == "eval"}
    best = checkpoint.step_of(checkpoint.best(finished / "checkpoints"))
    assert success[best] == max(success.values())


def test_eval_of_a_checkpoint_gives_what_the_run_had_logged(finished, capsys):
    """Same games, same prompts, same sampling: the options come from the run's folder."""
    last = rows(finished)[-1]
    assert evaluation.main(["--checkpoint", str(finished / "checkpoints" / "step-000005")]) == 0
    low, high = (f"{last[key]:.1%}" for key in ("eval/low", "eval/high"))
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == ["all", "5", f"{last['eval/success']:.1%}", low, "to", high]


def test_a_checkpoint_says_what_it_is_and_is_evaluated_wherever_it_lies(finished, tmp_path, capsys):
    last = finished / "checkpoints" / "step-000005"
    card = (last / "README.md").read_text()
    assert "# whole, update 5" in card and "5 of 5 updates, 20 episodes" in card
    (command,) = [
        line for line in card.splitlines() if line.startswith("python -m hiper_fast.eval")
    ]
    assert command.split() == ["python", "-m", "hiper_fast.eval", "--checkpoint", str(last)]
    shutil.copytree(last, tmp_path / "a" / "b" / "moved")
    assert evaluation.main(["--checkpoint", str(tmp_path / "a" / "b" / "moved")]) == 0
    found = capsys.readouterr().out.splitlines()[-1].split()  # all, games, success, low, to, high
    assert "| all | {1} | {2} | {3} to {5} |".format(*found) in card
    first = finished / "checkpoints" / "step-000004"
    assert "4 of 5 updates, 16 episodes" in (first / "README.md").read_text()


def test_episodes_are_stored_for_the_viewer(finished):
    files = sorted(path.name for path in (finished / "episodes").iterdir())
    assert files == [f"step-00000{i}.jsonl" for i in (0, 2, 4, 5)]
    episodes = [
        json.loads(line) for line in (finished / "episodes" / files[-1]).read_text().splitlines()
    ]
    assert {e["stage"] for e in episodes} == {"train", "eval"}
    assert sum(e["stage"] == "train" for e in episodes) == 4
    for episode in episodes:
        assert episode["step"] == 5 and episode["task_type"] in household.TASK_TYPES
        assert episode["won"] or episode["truncated"]
        assert 1 <= len(episode["turns"]) <= 4
        for i, turn in enumerate(episode["turns"]):
            levels = [turn[f"advantage_{level}"] for level in ("switch", "high", "low")]
            if episode["stage"] == "eval":
                assert levels == [None] * 3 and turn["value_high"] is None
            else:
                boundary = turn["switch"] or i == 0
                assert [x is None for x in levels] == [False, not boundary, False]
                assert isinstance(turn["value_low"], float)


def test_the_report_is_one_page(finished):
    page = (finished / "report.html").read_text()
    assert (
        page.startswith("<!")
        and "whole" in page
        and "https://" not in page.replace("https://arxiv", "")
    )


def test_the_report_exists_before_the_run_ends(finished):
    """And a second run of the same name is refused without touching the first."""
    before = rows(finished, times=True)
    assert train.main(arguments(finished.parent, name="whole")) == 2
    assert rows(finished, times=True) == before


# Resuming.


def start(folder, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "hiper_fast.train", *arguments(folder, **options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_at(folder, name, step):
    """A run of its own process that dies by SIGKILL as soon as it has logged `step`."""
    process = start(folder, name=name)
    deadline = time.monotonic() + 120
    while not any(
        r["stage"] == "train" and r["step"] >= step
        for r in read_metrics(folder / name / "metrics.jsonl")
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    return folder / name


def test_a_killed_run_resumes_exactly(finished, tmp_path):
    killed = killed_at(tmp_path, "killed", 3)
    assert rows(killed) != rows(finished)
    # Only the name is told: everything else comes from the run's own configuration.
    assert train.main(["--resume", "--name", "killed", f"--run.folder={tmp_path}"]) == 0
    assert rows(killed) == rows(finished)
    for name in ("model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        last = "checkpoints/step-000005"
        assert (killed / last / name).read_bytes() == (finished / last / name).read_bytes(), name
    for path in (finished / "episodes").iterdir():
        assert (killed / "episodes" / path.name).read_text() == path.read_text()
    cards = [
        (run / last / "README.md").read_text().replace(f"{run}/", "").replace(f"# {run.name},", "")
        for run in (killed, finished)
    ]
    assert cards[0] == cards[1]
    written = resolve([killed / "config.yaml"])
    assert not written.run.resume, "a run's options must not resume whoever reads them"


def test_a_run_of_transcripts_resumes_exactly_and_is_evaluated_and_shown(tmp_path, capsys):
    """Two updates, one sequence a trajectory, plain text; then the same with a stop in between."""
    options = {
        "agent.style": "transcript",
        "agent.max_prompt_tokens": 900,
        "train.final_lr": 1,
        "eval.every": 1,
    }
    options |= {
        "advantage.bootstrap": "next_state",
        "run.save_every": 1,
        "train.critic_updates": 0,
        "train.minibatches": 2,
    }
    for name, updates in (("whole", (2,)), ("parts", (1, 2))):
        for i, number in enumerate(updates):
            resume = ["--resume"] * (i > 0)
            assert (
                train.main(
                    [*arguments(tmp_path, name=name, **options | {"updates": number}), *resume]
                )
                == 0
            )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert rows(whole) == rows(parts)
    last = rows(whole)[-1]
    trained = [row for row in rows(whole) if row["stage"] == "train"]
    assert [row["step"] for row in trained] == [1, 2] and all(
        row["optim/skipped_steps"] == 0 for row in trained
    )
    assert trained[-1]["loss/kl"] > 0 and trained[-1]["loss/value"] > 0
    assert evaluation.main(["--checkpoint", str(whole / "checkpoints" / "step-000002")]) == 0
    assert f"{last['eval/success']:.1%}" in capsys.readouterr().out.splitlines()[-1].split()
    episodes = [
        json.loads(line)
        for line in (whole / "episodes" / "step-000002.jsonl").read_text().splitlines()
    ]
    assert {e["stage"] for e in episodes} == {"train", "eval"} and all(e["turns"] for e in episodes)


def dies_in(module, name, call, argv):
    """A run that dies by SIGKILL at the `call`th call of a function."""
    module, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(module, name)

    def deadly(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, deadly)
    train.main(argv)


@pytest.mark.parametrize(
    "moment",
    [
        ("hiper_fast.learn.update", "Step", 6),  # between the two optimiser steps of update 3
        (
            "hiper_fast.runs.checkpoint",
            "_put_in_place",
            3,
        ),  # step 4 is evaluated and logged, its checkpoint not yet there
        ("hiper_fast.runs.checkpoint", "_prune", 3),  # it is there, older ones are too
        ("hiper_fast.runs.report", "build", 3),  # all of it is written but the report
    ],
)
def test_a_run_killed_at_any_moment_resumes_exactly(finished, tmp_path, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiper_fast.train"])
    child = context.Process(target=dies_in, args=(*moment, arguments(tmp_path, name="killed")))
    child.start()
    child.join(200)
    assert child.exitcode == -signal.SIGKILL
    assert train.main(["--resume", "--name", "killed", f"--run.folder={tmp_path}"]) == 0
    killed = tmp_path / "killed"
    assert rows(killed) == rows(finished)
    last, best = ([find(run / "checkpoints").name for run in (killed, finished)] for find in (
        checkpoint.latest, checkpoint.best))  # fmt: skip
    assert last[0] == last[1] and best[0] == best[1]


def test_a_run_killed_before_its_first_checkpoint_starts_over(finished, tmp_path):
    run = tmp_path / "early"
    run.mkdir()
    (run / "config.yaml").write_text(
        (finished / "config.yaml").read_text().replace("name: whole", "name: early")
    )
    warm = [
        line
        for line in (finished / "metrics.jsonl").read_text().splitlines()
        if "warm_start" in line
    ]
    (run / "metrics.jsonl").write_text("\n".join(warm[:2]) + '\n{"step": 3, "st')
    options = ["--resume", "--name", "early", f"--run.folder={tmp_path}", "--updates", "1"]
    assert train.main(options) == 0
    first = [
        row
        for row in rows(finished)
        if row["stage"] != "train" and row["step"] == 0 or row["stage"] == "warm_start"
    ]
    assert rows(run)[: len(first)] == first


def test_a_finished_run_goes_on_when_given_more_updates(finished, tmp_path):
    import shutil

    run = tmp_path / "whole"
    shutil.copytree(finished, run)
    options = ["--resume", "--name", "whole", f"--run.folder={tmp_path}"]
    before = rows(run)
    assert train.main(options) == 0
    assert rows(run) == before, "nothing was left to do"
    assert (
        train.main([*options, "--updates", "6", "--train.lr", "0", "--train.critic_lr", "0"]) == 0
    )
    assert [row["step"] for row in rows(run) if row["stage"] == "train"] == [1, 2, 3, 4, 5, 6]
    old, new = (make_tiny(path=str(run / "checkpoints" / f"step-00000{i}")).model for i in (5, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)
    ), "the learning rate given on resuming is the one that is used"


# A loss that is not finite.


def spoil(monkeypatch, steps):
    """NaN advantages at the given updates, counted from 1."""
    give_credit, count = train.give_credit, iter(range(1, 100))

    def spoiled(*args):
        targets = give_credit(*args)
        if next(count) in steps:
            targets.advantages.fill_(float("nan"))
        return targets

    monkeypatch.setattr(train, "give_credit", spoiled)


def test_nan_again_and_again_stops_the_run_and_the_advice_goes_on_from_a_good_state(
    tmp_path, monkeypatch, capsys
):
    """From before the last sound update: its weights are those with which no loss was finite."""
    spoil(monkeypatch, range(4, 100))
    options = {"updates": 9, "train.critic_updates": 0, "train.max_skipped": 5, "run.save_every": 1}
    assert train.main(arguments(tmp_path, name="nan", **options)) == 2
    err = capsys.readouterr().err
    assert "not finite" in err and "train.lr" in err and "--resume --name nan" in err
    assert err.count("\n") == 1 and "Traceback" not in err
    run = tmp_path / "nan"
    train_rows = [row for row in rows(run) if row["stage"] == "train"]
    assert [row["optim/skipped_steps"] for row in train_rows] == [0, 0, 0, 2, 2, 2]
    assert {2, 3} <= set(checkpoint.list_steps(run / "checkpoints")), (
        "no state of a row of skipped steps takes a good one's place"
    )
    model = make_tiny(path=str(checkpoint.latest(run / "checkpoints"))).model
    assert all(torch.isfinite(p).all() for p in model.parameters())

    monkeypatch.undo()
    command = shlex.split(err.partition(": python -m hiper_fast.train")[2])
    assert ["--run.resume_from", "2", "--train.lr", "0.00075"] == command[-4:]
    assert train.main([*command, "--updates", "4"]) == 0
    assert [row["step"] for row in rows(run) if row["stage"] == "train"] == [1, 2, 3, 4]
    assert rows(run)[-2]["step"] == 4 and rows(run)[-2]["optim/skipped_steps"] == 0
    kept = rows(run / "until-000006")
    assert [row["step"] for row in kept if row["stage"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_nan_now_and_then_is_skipped_and_counted(tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 3})
    options = {
        "updates": 3,
        "train.critic_updates": 0,
        "train.max_skipped": 3,
        "warm_start.enabled": "no",
    }
    assert train.main(arguments(tmp_path, name="some", **options)) == 0
    skipped = [
        row["optim/skipped_steps"] for row in rows(tmp_path / "some") if row["stage"] == "train"
    ]
    assert skipped == [2, 0, 2]


# Other ends.


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(
    tmp_path, monkeypatch, capsys
):
    write = checkpoint.write_tensors

    def full(file, *rest):
        if "step-000002" in str(file) and "optimizer" in str(file):
            raise OSError(28, "No space left on device")
        write(file, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert (
        train.main(arguments(tmp_path, name="full", updates=2, **{"warm_start.enabled": "no"})) == 2
    )
    err = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in err and "step-000002" in err
    assert checkpoint.latest(tmp_path / "full" / "checkpoints").name == "step-000000"
    monkeypatch.undo()
    assert train.main(["--resume", "--name", "full", f"--run.folder={tmp_path}"]) == 0
    assert checkpoint.latest(tmp_path / "full" / "checkpoints").name == "step-000002"


def test_a_full_disk_never_leaves_half_an_episode(tmp_path, monkeypatch):
    record = {"task": "t", "turns": []}
    monkeypatch.setattr(viewer, "build_record", lambda *_: record)
    batch = SimpleNamespace(episodes=[None])
    viewer.write_episodes(tmp_path, 3, "eval", batch)
    whole, write_text = (tmp_path / "step-000003.jsonl").read_text(), Path.write_text

    def full(self, text, **options):
        write_text(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        viewer.write_episodes(tmp_path, 3, "train", batch)
    assert (tmp_path / "step-000003.jsonl").read_text() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["step-000003.jsonl"], "no half file stays"
    viewer.write_episodes(tmp_path, 3, "train", batch)
    lines = (tmp_path / "step-000003.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["eval", "train"]


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "update", interrupted)
    assert train.main(arguments(tmp_path, name="stopped", **{"warm_start.enabled": "no"})) == 130
    assert "--resume" in capsys.readouterr().err


# Other ways to run.


def test_no_updates_stop_after_the_warm_start(tmp_path):
    assert train.main(arguments(tmp_path, name="warm", updates=0)) == 0
    assert {row["stage"] for row in rows(tmp_path / "warm")} == {"warm_start", "eval"}
    assert checkpoint.latest(tmp_path / "warm" / "checkpoints").name == "step-000000"


def test_shared_critic_flat_gae_and_no_reference(tmp_path):
    options = {
        "updates": 2,
        "model.critic": "shared",
        "advantage.estimator": "gae",
        "train.kl_coef": 0,
        "warm_start.enabled": "no",
        "agent.style": "reference",
        "agent.max_prompt_tokens": 390,  # format and task take 380
        "train.critic_updates": 0,
    }
    assert train.main(arguments(tmp_path, name="other", **options)) == 0
    last = rows(tmp_path / "other")[-2]
    assert last["stage"] == "train" and last["rollout/truncated_prompts"] > 0
    assert math.isfinite(last["loss/value"])


def alfworld_folder(folder, count=3):
    """Generated games, laid out as the official ones are."""
    for split in ("train", "valid_seen"):
        for seed in range(count):
            game = household.generate(household.TASK_TYPES[seed], seed=seed, size="small")
            place = folder / "json_2.1.1" / split / f"{game['task_type']}-{seed}" / "trial"
            place.mkdir(parents=True)
            (place / "game.tw-pddl").write_text(json.dumps(game))
    return folder


@pytest.mark.parametrize("demonstrations", ["search", "listed", "walkthrough"])
def test_the_same_command_with_data_plays_the_official_games(tmp_path, monkeypatch, demonstrations):
    monkeypatch.setenv("ALFWORLD_DATA", str(alfworld_folder(tmp_path / "data")))
    options = {"env": "auto", "updates": 1, "warm_start.demonstrations": demonstrations}
    assert train.main(arguments(tmp_path / "runs", **options)) == 0
    run = tmp_path / "runs" / "alfworld-seed0"
    panel = [row for row in rows(run) if row["stage"] == "eval"]
    assert [row["eval/episodes"] for row in panel] == [3, 3], "the whole split, each game once"
    assert yaml.safe_load((run / "config.yaml").read_text())["env"]["name"] == "alfworld"


# Bad input: exit status 2 and one line.


def failure(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(train.main(argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_unknown_option(tmp_path, capsys):
    assert "did you mean train.updates" in failure(capsys, ["--train.uptates", "3"])


def test_missing_data(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    assert "ALFWORLD_DATA" in failure(capsys, arguments(runs, env="alfworld"))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    assert "nowhere" in failure(capsys, arguments(runs, env="auto"))
    data = alfworld_folder(tmp_path / "data", count=1)
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    err = failure(capsys, arguments(runs, env="auto", env__eval_split="valid_unseen"))
    assert "valid_unseen" in err, "found before any work is done"
    assert not runs.exists(), "a run that cannot begin leaves no folder"


def test_corrupt_game_file(tmp_path, monkeypatch, capsys):
    data = alfworld_folder(tmp_path / "data", count=1)
    [game] = data.glob("json_2.1.1/train/*/*/game.tw-pddl")
    game.write_text(game.read_text()[:500])
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    assert str(game) in failure(capsys, arguments(tmp_path / "runs", env="auto", updates=1))


def test_bad_task_type(tmp_path, capsys):
    err = failure(capsys, arguments(tmp_path, **{"env.task_types": "juggle"}))
    assert "task_types" in err and "look_at_obj_in_light" in err


def test_a_run_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in failure(capsys, arguments(tmp_path / "file", updates=0))


def test_resume_without_a_run(tmp_path, capsys):
    assert "there is no run" in failure(capsys, arguments(tmp_path, resume="true"))


def broken_model(folder, kind):
    model, tokenizer = (
        tiny.build_model(tiny.load_tokenizer(HOUSEHOLD.tokenizer), 0),
        tiny.load_tokenizer(HOUSEHOLD.tokenizer),
    )
    if kind != "missing":
        model.save_pretrained(folder)
    if kind == "corrupt weights":
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}" + bytes(100))
    if kind == "corrupt config":
        (folder / "config.json").write_text('{"model_type": ')
    if kind == "unknown type":
        (folder / "config.json").write_text('{"model_type": "abacus"}')
    if kind != "no tokenizer" and folder.exists():
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_run_says_at_once_what_its_settings_spoil(tmp_path, capsys):
    """A rate before anything is played; prompts and responses that are cut, in the first evaluation and update."""
    options = {
        "agent.style": "reference",
        "agent.max_prompt_tokens": 390,
        "agent.max_response_tokens": 4,
    }
    options |= {"updates": 1, "warm_start.enabled": "no", "train.lr": 0.1, "run.display": "plain"}
    assert train.main(arguments(tmp_path, name="told", **options)) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(" is ")[0] for line in lines if line.startswith("warning: ")]
    cut = ["truncated_prompts", "responses_at_limit"]
    assert told == [
        "warning: train.lr",
        *(f"warning: {stage}/{name}" for stage in ("eval", "rollout") for name in cut),
    ]
    assert lines[0].startswith("warning: train.lr is 0.1, 1")


def test_prompts_without_room_for_a_game_are_refused(tmp_path, capsys):
    options = {"agent.style": "reference", "agent.max_prompt_tokens": 300}
    err = failure(capsys, arguments(tmp_path / "runs", **options))
    assert "agent.max_prompt_tokens: 300 leave nothing" in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "kind", ["missing", "corrupt weights", "corrupt config", "unknown type", "no tokenizer"]
)
def test_a_model_that_cannot_be_loaded(tmp_path, capsys, kind):
    path = broken_model(tmp_path / "model", kind)
    runs = tmp_path / "runs"
    capsys.readouterr()  # saving it was not silent
    err = failure(capsys, arguments(runs, model=path))
    assert "model.path" in err and path in err
    assert not runs.exists()


def test_the_command_itself_ends_with_one_line(tmp_path):
    """In a process of its own, where the libraries' own messages would show too."""
    process = start(tmp_path, model=str(tmp_path / "nowhere"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and "nowhere" in err, err
