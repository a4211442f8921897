"""Runs whose environments fail: what is whole is trained on, what is lost is counted, and too much stops the run."""

import pytest
from helpers import configure

from hiper_fast import train
from hiper_fast.distributed import ALONE
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import TooManyLost
from hiper_fast.runs import checkpoint
from hiper_fast.runs.metrics import read_metrics

EPISODES = 12


def settings(folder, faults, **options):
    given = {
        "env__faults": faults, "env__max_turns": "3", "agent__max_response_tokens": "6", "train__updates": "2",
        "train__episodes": str(EPISODES), "train__minibatches": "1", "eval__episodes": "4", "eval__every": "9",
        "run__folder": str(folder), "run__name": "run", "run__display": "none", "run__threads": "1",
        "warm_start__enabled": "no", "rollout__env_timeout": "1.5", "rollout__max_lost": "0.9",
    }  # fmt: skip
    return configure("faulty:Family", **(given | options))


def count_faulty(config, step):
    games = Games(config)
    return sum(task["seed"] % 4 == 1 for task in games.draw(f"update {step}", EPISODES))


def read(folder, stage):
    return [row for row in read_metrics(folder / "run" / "metrics.jsonl") if row["stage"] == stage]


@pytest.mark.parametrize(
    "faults, options",
    [
        ("exit,hang,raise,nothing,kill,number", {"rollout__workers": "3"}),
        ("raise,nothing,number", {}),
        ("raise", {"rollout__slots": "2"}),
    ],
)
def test_what_is_whole_is_trained_on(tmp_path, faults, options):
    config = settings(tmp_path, faults, **options)
    train.train(config, ALONE)
    rows = read(tmp_path, "train")
    lost = [count_faulty(config, step) for step in (1, 2)]
    assert [row["rollout/lost"] for row in rows] == lost and sum(lost) > 0
    assert all(row["loss/policy"] == row["loss/policy"] for row in rows), "updates were made"
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run" / "checkpoints")) == 2
    # The panel's seeds leave 0, 1, 2, 3: one of four is lost.
    assert [(row["eval/lost"], row["eval/episodes"]) for row in read(tmp_path, "eval")] == [
        (1, 3)
    ] * 2


def test_too_many_lost_stop_the_run_with_its_state_saved(tmp_path, capsys):
    argv = [
        "--env", "faulty:Family", "--env.faults", "raise", "--run.folder", str(tmp_path), "--name", "run",
        "--train.updates", "3", "--train.episodes", str(EPISODES), "--eval.episodes", "4", "--eval.every", "9",
        "--env.max_turns", "3", "--agent.max_response_tokens", "6", "--warm_start.enabled", "no",
        "--rollout.max_lost", "0.26", "--env.every", "2", "--run.display", "none", "--model.device", "cpu",
        "--run.threads", "1",
    ]  # fmt: skip
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert "more than rollout.max_lost (0.26) allows" in err and "ZeroDivisionError" in err
    assert "Traceback" not in err


def test_a_later_loss_leaves_the_updates_before_it(tmp_path, monkeypatch):
    config = settings(tmp_path, "raise", rollout__max_lost="0.5", train__updates="3")
    calls = []

    def fail(self, draw, following):
        calls.append(draw)
        if len(calls) == 2:
            raise TooManyLost("7 of 12 episodes were lost")
        return self.play(draw)

    monkeypatch.setattr("hiper_fast.rollout.play.Rollouts.play_on", fail)
    with pytest.raises(TooManyLost):
        train.train(config, ALONE)
    monkeypatch.undo()
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run" / "checkpoints")) == 1
    config.run.resume = True
    train.train(config, ALONE)
    assert [row["step"] for row in read(tmp_path, "train")] == [1, 2, 3]
