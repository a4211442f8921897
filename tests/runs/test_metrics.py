from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hiper_fast.runs import display
from hiper_fast.runs.display import draw_sparkline
from hiper_fast.runs.metrics import Logger, read_metrics, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n, z=1.959964) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(1, 1)
    assert 0 < low < 1 and high == 1.0
    for successes, n in ((2, 1), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, n)


def lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def train(logger: Logger, steps: range) -> None:
    for step in steps:
        logger.log(
            step,
            "train",
            {"rollout/success": step / 10, "loss/kl": 0.01 * step, "episodes": 8 * step},
        )
        if step % 2 == 0:
            logger.log(step, "eval", {"eval/success": step / 10, "eval/low": 0.0, "eval/high": 1.0})


def test_rows_are_flat_json_written_at_once(tmp_path):
    with Logger(tmp_path, display="none") as logger:
        logger.log(
            3,
            "train",
            {"a": 1, "b": torch.tensor(0.5), "c": np.float32(2), "d": np.int64(3), "e": True},
        )
        assert json.loads(lines(tmp_path)[0]) == {
            "step": 3,
            "stage": "train",
            "a": 1,
            "b": 0.5,
            "c": 2.0,
            "d": 3,
            "e": 1,
        }
        with pytest.raises(TypeError, match="'f'"):
            logger.log(4, "train", {"f": "text"})
        logger.log(4, "eval", {"eval/won/look": "0110"})
        assert json.loads(lines(tmp_path)[1])["eval/won/look"] == "0110"
        with pytest.raises(TypeError, match="'eval/won/look'"):
            logger.log(4, "eval", {"eval/won/look": 3})


def test_not_a_number_becomes_null(tmp_path):
    with Logger(tmp_path, display="plain") as logger:
        logger.log(
            1,
            "train",
            {
                "loss/kl": math.nan,
                "loss/value": torch.tensor(math.inf),
                "rollout/success": math.nan,
            },
        )
        logger.log(1, "eval", {"eval/success": math.nan})
    row = json.loads(lines(tmp_path)[0], parse_constant=pytest.fail)
    assert row["loss/kl"] is None and row["loss/value"] is None


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run in (whole, resumed):
        with Logger(run, display="none") as logger:
            for step in (0, 50, 100):
                logger.log(step, "warm_start", {"loss/imitation": 1.0})
            train(logger, range(1, 8))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "stage": "tra')
    with Logger(resumed, resume_step=4, display="none") as logger:
        assert len(lines(resumed)) == 3 + 4 + 2
        train(logger, range(5, 8))
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_new_run_in_an_old_folder_starts_afresh(tmp_path):
    for _ in range(2):
        with Logger(tmp_path, display="none") as logger:
            logger.log(50, "warm_start", {})
            train(logger, range(1, 3))
    assert len(lines(tmp_path)) == 4


def test_read_metrics_of_nothing(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('\n[1]\n{"step": 1}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_stages_are_timed_and_added_up(tmp_path):
    with Logger(tmp_path, display="none") as logger:
        for _ in range(2):
            with logger.stage("rollout"):
                time.sleep(0.02)
        logger.log(1, "train", {})
        logger.log(2, "train", {})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert 0.04 <= first["time/rollout"] < 1 and "time/rollout" not in second


def scalars(run: Path) -> dict[str, list[int]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_events_are_purged_on_resume(tmp_path):
    with Logger(tmp_path, display="none") as logger:
        logger.log(500, "warm_start", {"loss/imitation": 1.0})
        train(logger, range(1, 6))
    time.sleep(1.1)  # event files are named by the second
    with Logger(tmp_path, resume_step=3, display="none") as logger:
        train(logger, range(4, 6))
        logger.log(6, "eval", {"eval/won/look": "01"})  # no number, so no event
    assert scalars(tmp_path)["rollout/success"] == [1, 2, 3, 4, 5]
    assert scalars(tmp_path)["eval/success"] == [2, 4]
    assert any((tmp_path / "tensorboard" / "warm_start").iterdir())


FULL = {
    "rollout/success": 0.5, "rollout/segment_length": 3.25, "rollout/switch_rate": 0.3,
    "rollout/valid_rate": 0.98,
    "loss/policy": -0.01, "loss/value": 0.2, "loss/kl": math.nan,
    "time/rollout": 1.5, "time/total": 75.0,
}  # fmt: skip


def test_plain_display_is_one_line_a_row(tmp_path, capsys):
    with Logger(tmp_path, display="auto", total_steps=40) as logger:
        logger.message("hello")
        logger.log(100, "warm_start", {"loss/imitation": 0.25, "warm_start/accuracy": 0.9})
        logger.log(7, "train", FULL)
        logger.log(
            7,
            "eval",
            {"eval/success": 0.5, "eval/low": 0.41, "eval/high": 0.59, "eval/episodes": 128},
        )
    hello, warm, update, evaluation = capsys.readouterr().out.splitlines()
    assert hello == "hello" and "accuracy 90.0%" in warm
    assert (
        "7/40" in update
        and "success 50.0%" in update
        and "kl –" in update
        and "time 1m15s" in update
    )
    assert "success 50.0% [41.0%, 59.0%]" in evaluation and "episodes 128" in evaluation


def test_live_panel_shows_everything(tmp_path, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda: Console(file=output, force_terminal=True, width=100)
    )
    monkeypatch.setenv("TERM", "xterm")
    with Logger(tmp_path, total_steps=40) as logger:
        logger.log(100, "warm_start", {"loss/imitation": 0.25})
        logger.log(0, "eval", {"eval/success": 0.4, "eval/low": 0.3, "eval/high": 0.5})
        for step in range(1, 4):
            logger.log(step, "train", FULL)
        logger.message("[saved] step-000003")
    text = output.getvalue()
    labels = ["eta", "segment", "switch", "valid", "policy loss", "kl", "rollout", "total"]
    for expected in ["update 3 / 40", *labels, "▅", "[saved]"]:
        assert expected in text


def show_panel(tmp_path, monkeypatch, *rows):
    output = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda: Console(file=output, force_terminal=True, width=100)
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    with Logger("runs/mine", total_steps=40) as logger:
        for step, row in enumerate(rows, 1):
            logger.log(step, "train", row)
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output.getvalue())


def test_the_panel_names_the_run_folder(tmp_path, monkeypatch):
    assert "─ runs/mine ─" in show_panel(tmp_path, monkeypatch, FULL)


ALONE = FULL | dict.fromkeys(
    ["loss/policy", "loss/kl", "loss/entropy", "loss/clip_fraction", "optim/grad_norm"], 0.0
)


@pytest.mark.parametrize(
    ("row", "dashes", "figures"),
    [
        (ALONE, ["policy loss", "kl", "entropy", "clipped", "grad norm"], ["value loss"]),
        (FULL | {"loss/value": 0.0}, ["value loss", "kl"], ["policy loss"]),
        (FULL | {"loss/value": 0.0, "value/explained_low": 0.5}, ["kl"], ["value loss"]),
    ],
)
def test_what_does_not_train_is_a_dash(tmp_path, monkeypatch, capsys, row, dashes, figures):
    text = show_panel(tmp_path, monkeypatch, row)
    for label in dashes:
        assert re.search(rf"{label} +–", text), label
    for label in figures:
        assert re.search(rf"{label} +-?\d", text), label
    with Logger(tmp_path, display="plain") as logger:
        logger.log(1, "train", row)
    line = capsys.readouterr().out
    assert ("policy –" in line) == ("policy loss" in dashes)
    assert ("value –" in line) == ("value loss" in dashes)


def test_sparkline():
    assert draw_sparkline([0.0, 1.0, None, 0.5, 2.0, -1.0], 5) == "█·▅█▁"
    assert draw_sparkline([], 5) == ""


def test_unknown_display(tmp_path):
    with pytest.raises(ValueError, match="display"):
        Logger(tmp_path, display="fancy")
