from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import Page

from hiper_fast.report import main
from hiper_fast.runs import report
from hiper_fast.runs.charts import choose_ticks
from hiper_fast.runs.metrics import wilson

EVIL = '</script><script>alert("x")</script><!-- <b>&amp; \u2028 \ud800'


def turn(**changes) -> dict:
    return {
        "observation": "You see a mug 1.",
        "switch": True, "valid": True, "subgoal": "find a mug", "action": "look",
        "response": "<switch>SWITCH</switch><subgoal>find a mug</subgoal><action>look</action>",
        "reward": 1.0,
        "advantage_switch": 0.5, "advantage_high": -1.0, "advantage_low": 2.0,
        "value_switch": 0.1, "value_high": 0.2, "value_low": 0.3, **changes,
    }  # fmt: skip


def episode(step: int, turns: list[dict], stage: str = "train", **changes) -> dict:
    base = {
        "step": step,
        "stage": stage,
        "task": "find a mug",
        "task_type": "pick_and_place_simple",
    }
    return {**base, "won": True, "truncated": False, "turns": turns, **changes}


def write_run(
    folder: Path,
    rows: list[dict],
    episodes: list[dict] = (),
    config: str = "env:\n  name: household\n",
) -> Path:
    (folder / "episodes").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for one in episodes:
        with (folder / "episodes" / f"step-{one['step']:06d}.jsonl").open("a") as file:
            file.write(json.dumps(one) + "\n")
    return folder


def evaluation(step: int, wins: int, n: int = 64) -> dict:
    low, high = wilson(wins, n)
    return {
        "step": step, "stage": "eval", "eval/success": wins / n, "eval/low": low,
        "eval/high": high, "eval/episodes": n,
        "eval/success/pick_two_obj_and_place": wins / n,
        "eval/episodes/pick_two_obj_and_place": n, "eval/turns": 9.0,
    }  # fmt: skip


def update(step: int, **changes) -> dict:
    return {
        "step": step, "stage": "train", "rollout/success": 0.5,
        "rollout/segment_length": 3.0, "rollout/switch_rate": 0.3,
        "rollout/valid_rate": 1.0, "loss/policy": -0.1, "loss/value": 0.2, "loss/kl": 0.01,
        "time/rollout": 1.0,
        "time/update": 2.0, "time/total": 3.5, "episodes": 8 * step, **changes,
    }  # fmt: skip


def build(folder: Path) -> Page:
    return Page(report.build(folder).read_text())


SECTIONS = {"figures", "success", "tasks", "episodes", "curves", "config"}


def test_every_section_of_a_whole_run(tmp_path):
    rows = [
        {
            "step": 10,
            "stage": "warm_start",
            "loss/imitation": 1.0,
            "warm_start/accuracy": 0.5,
            "time/total": 4.0,
        }
    ]
    rows += [
        {
            "step": 20,
            "stage": "warm_start",
            "loss/imitation": 0.5,
            "warm_start/accuracy": 0.8,
            "time/total": 4.0,
        }
    ]
    rows += [evaluation(0, 32), *(update(step) for step in range(1, 8)), evaluation(7, 48)]
    page = build(write_run(tmp_path / "run", rows, [episode(7, [turn(), turn(switch=False)])]))
    assert SECTIONS <= page.ids
    for text in (
        "50.0%",
        "75.0%",
        "+25.0",
        "56 episodes",
        "4.0s warm start",
        "pick two obj and place",
        "household",
        "64 games",
    ):
        assert text in page.text, text
    for title in (
        "Switch rate",
        "Valid rate",
        "Value loss",
        "KL",
        "Time per update",
        "imitation",
        "Segment length",
    ):
        assert title in page.text, title
    low, high = wilson(32, 64)
    assert f"{100 * low:.1f}% – {100 * high:.1f}%" in page.text
    (entry,) = page.data
    assert (entry["step"], entry["stage"], len(entry["episodes"][0]["turns"])) == (7, "train", 2)


@pytest.mark.parametrize("warm", [True, False])
def test_the_start_is_named_after_what_there_was(tmp_path, warm):
    rows = [{"step": 9, "stage": "warm_start", "time/total": 4.0}] * warm
    rows += [evaluation(0, 32), update(1), evaluation(1, 48)]
    text = build(write_run(tmp_path / "run", rows)).text
    named, other = ("Warm start", "Before training")[:: 1 if warm else -1]
    assert text.count(named) == 2 and other not in text, "a card and a column"
    assert ("warm start, " in text) == warm


def test_what_does_not_train_yet_has_no_curve(tmp_path):
    """While the critic trains alone the policy's figures are 0 in the file, and no curve begins there."""
    zero = dict.fromkeys(["loss/policy", "loss/kl", "loss/entropy", "optim/grad_norm"], 0.0)
    rows = [update(1, **zero), update(2, **zero), update(3), update(4)]
    page = build(write_run(tmp_path / "run", rows))
    charts = [json.loads(own["data-hover"]) for tag, own in page.tags if tag == "figure"]
    [texts] = [chart["text"] for chart in charts if "policy loss" in chart["text"][-1]]
    assert texts[:2] == ["step 1", "step 2"] and "policy loss -0.1" in texts[2]


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    report.build(write_run(tmp_path / "run", [update(1)], [episode(1, [turn()])]))
    page = build(tmp_path / "run")
    assert not any(attributes.keys() & {"src", "href"} for _, attributes in page.tags)
    assert "http" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [evaluation(0, 3)],
        [update(1)],
        [{"step": 0, "stage": "eval", "eval/success": 0.0}],
        [{"step": 1, "stage": "eval"}],
    ],
)
def test_small_and_empty_runs(tmp_path, rows):
    page = build(write_run(tmp_path / "run", rows))
    assert SECTIONS <= page.ids and page.data == []


def test_a_folder_without_any_file(tmp_path):
    page = build(tmp_path)
    assert "Nothing has been logged yet." in page.text and "no config.yaml" in page.text


def test_not_a_number_and_null_leave_gaps(tmp_path):
    nothing = dict.fromkeys(["rollout/success", "loss/kl", "loss/value", "time/rollout"])
    rows = [
        update(1),
        update(2, **nothing),
        update(3),
        update(4, **{"loss/kl": math.nan, "loss/policy": math.inf}),
    ]
    rows += [{**evaluation(4, 5), "eval/low": None}, {**evaluation(5, 5), "eval/success": math.nan}]
    page = build(
        write_run(tmp_path / "run", rows, [episode(4, [turn(advantage_low=math.nan, reward=None)])])
    )
    paths = [attributes["d"] for tag, attributes in page.tags if tag == "path"]
    assert paths and all("nan" not in path and "inf" not in path for path in paths)
    assert any(path.count("M") == 2 for path in paths)
    assert page.data[0]["episodes"][0]["turns"][0]["advantage"] == {
        "switch": 0.5,
        "subgoal": -1.0,
        "action": None,
    }


def test_a_flat_and_a_single_valued_curve(tmp_path):
    page = build(write_run(tmp_path / "run", [update(3, **{"loss/kl": 0.0, "loss/value": -2.0})]))
    assert "Value loss" in page.text


def test_no_text_becomes_markup(tmp_path):
    evil = episode(
        1, [turn(observation=EVIL, response=EVIL, subgoal=EVIL)], task=EVIL, task_type=EVIL
    )
    rows = [
        update(1),
        {**evaluation(1, 1), f"eval/success/{EVIL}": 1.0, f"eval/episodes/{EVIL}": 1},
    ]
    folder = write_run(tmp_path / "run <b>&", rows, [evil], config="run: '</pre><script>'\n")
    page = build(folder)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and "b" not in tags
    assert page.data[0]["episodes"][0]["task"] == EVIL
    assert "run <b>&" in page.text and "</pre><script>" in page.text


def test_eval_episodes_have_no_colour_scale(tmp_path):
    blank = {
        f"{kind}_{level}": None
        for kind in ("advantage", "value")
        for level in ("switch", "high", "low")
    }
    page = build(write_run(tmp_path / "run", [], [episode(0, [turn(**blank)], stage="eval")]))
    assert page.data[0]["scale"] is None


def test_half_written_and_foreign_episode_lines_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [], [episode(2, [turn()])])
    with (folder / "episodes" / "step-000002.jsonl").open("a") as file:
        file.write('[1]\n"text"\n{"step": 2, "stage": "train", "turns": [')
    assert len(build(folder).data[0]["episodes"]) == 1


def test_hundreds_of_updates_stay_small_and_quick(tmp_path):
    rows = [row for step in range(1, 601) for row in (update(step), evaluation(step, step % 64))]
    episodes = [episode(step, [turn()] * 20) for step in range(0, 600, 10) for _ in range(16)]
    folder = write_run(tmp_path / "run", rows, episodes)
    start = time.perf_counter()
    path = report.build(folder)
    assert time.perf_counter() - start < 5
    assert path.stat().st_size < 6e6
    data = Page(path.read_text()).data
    assert len(data) == report.SHOWN_STEPS and data[0]["step"] == 0 and data[-1]["step"] == 590


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("<action>go</action>", [("<action>go</action>", "action")]),
        ("hm <switch>KEEP</switch> é", 
         [("hm ", "action"), ("<switch>KEEP</switch>", "switch"), (" é", "action")]),
        (
            "é<switch>KEEP</switch><subgoal>a</subgoal> <action>b</action>.",
            [("é", ""), ("<switch>KEEP</switch>", "switch"), ("<subgoal>a</subgoal>", "subgoal"),
             (" ", ""), ("<action>b</action>", "action"), (".", "")],
        ),
        (
            "<subgoal>a<action>b</action></subgoal>",
            [("<subgoal>a", "subgoal"), ("<action>b</action>", "action"),
             ("</subgoal>", "subgoal")],
        ),
    ],
)  # fmt: skip
def test_cut_blocks(text, expected):
    assert report.cut_blocks(text) == expected


def test_ticks_are_round_and_inside():
    assert choose_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert choose_ticks(-0.03, 0.021, 4) == [-0.02, 0, 0.02]


def test_command_line(tmp_path, capsys):
    write_run(tmp_path / "run", [update(1)])
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
    assert (
        sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("."))
        == []
    )


def test_module_runs(tmp_path):
    command = [sys.executable, "-m", "hiper_fast.report", "--help"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert result.returncode == 0 and "run folder" in result.stdout


def test_a_full_disk_keeps_the_old_report(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [update(1)])
    before = report.build(folder).read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.build(folder)
    assert (folder / "report.html").read_text() == before
    assert not (folder / ".report.html.tmp").exists()
