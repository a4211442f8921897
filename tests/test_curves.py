"""The curves' figure: wall time from the metrics, what is labelled, well-formed SVG, clear errors."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "curves.py"
SPEC = importlib.util.spec_from_file_location("curves", FILE)
curves = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(curves)

WARM = [
    {"step": 5, "stage": "warm_start", "time/demonstrations": 12.0, "time/total": 30.0},
    {"step": 9, "stage": "warm_start", "time/total": 48.0},
]


def evaluation(step, won, seconds=6.0, games=100):
    return {
        "step": step,
        "stage": "eval",
        "eval/success": won / games,
        "eval/episodes": games,
        "time/eval": seconds,
    }


def update(step, seconds):
    return {"step": step, "stage": "train", "time/rollout": 1.0, "time/total": seconds}


ROWS = [*WARM, evaluation(0, 25), update(1, 54.0), update(2, 60.0), evaluation(2, 75)]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        return tmp_path / name

    return write


def texts(svg):
    return [
        element.text
        for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_wall_time_is_the_sum_of_what_was_timed(write):
    run = curves.read_run(write(ROWS))
    seconds = [12 + 48 + 6, 12 + 48 + 6 + 54 + 60 + 6]
    assert [60 * p.minutes for p in run.points] == pytest.approx(seconds)
    assert [p.update for p in run.points] == [0, 2] and [p.rate for p in run.points] == [0.25, 0.75]
    assert run.label == "seed0" and run.warm_started
    assert all(
        0 < p.low < p.rate < p.high < 1 for p in run.points
    )  # Wilson's, where the rows have none


def test_times_that_are_missing_or_null_count_nothing(write):
    rows = [
        {"step": 1, "stage": "train"},
        {"step": 2, "stage": "train", "time/total": None},
        evaluation(2, 1),
    ]
    run = curves.read_run(write(rows) / "metrics.jsonl")
    assert [p.minutes for p in run.points] == pytest.approx([0.1]) and not run.warm_started


def test_figure(write, tmp_path):
    out = tmp_path / "figures.svg"
    folders = [str(write(ROWS, f"seed{i}")) for i in range(3)]
    before = sorted(tmp_path.rglob("*"))
    assert curves.main([*folders, "--out", str(out), "--labels", "seed 0,<b>,2 & 3"]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, out])
    svg = out.read_text(encoding="utf-8")
    shown = texts(svg)
    assert "seed 0: 25.0 % → 75.0 %" in shown and "<b>: 25.0 % → 75.0 %" in shown
    assert any("after the warm start → at the end" in text for text in shown)
    assert {"minutes of wall time", "updates"} <= set(shown)
    assert shown.count("25 %") == shown.count("75 %") == 3
    assert svg.count('class="band"') == svg.count("<polyline") == 6 and svg.count("<circle") == 12
    assert "prefers-color-scheme: dark" in svg
    heights = [float(h) for h in re.findall(r'y="([\d.]+)" text-anchor="start">75 %', svg)]
    assert len(heights) == 3 and all(
        b - a >= 14 for a, b in zip(heights, heights[1:], strict=False)
    )


@pytest.mark.parametrize(
    "rows", [[evaluation(0, 0)], [evaluation(0, 100)], [evaluation(0, 0, seconds=0.0)]]
)
def test_one_evaluation(write, rows):
    svg = curves.draw([curves.read_run(write(rows))])
    assert "nan" not in svg and "inf" not in svg
    assert any("at the start" in text for text in texts(svg))
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= curves.WIDTH and 0 <= float(y) <= curves.HEIGHT


def test_labels_keep_apart_and_inside():
    assert curves.apart([10, 10, 50], 14, 60) == [10, 24, 50]
    assert curves.apart([55, 58, 60], 14, 60) == [32, 46, 60]
    assert curves.apart([], 14, 60) == []


def test_errors_name_the_run(write, tmp_path, capsys):
    good, empty = str(write(ROWS)), str(write([update(1, 1.0)], "young"))
    missing = str(tmp_path / "missing")
    for arguments, named in [
        ([missing, "--out", "a.svg"], f"{missing}: there is no metrics.jsonl"),
        ([good, empty, "--out", "a.svg"], f"{empty}: no evaluation"),
        ([good, "--out", f"{missing}/a.svg"], f"--out {missing}/a.svg: cannot be written"),
        ([good, "--out", "a.svg", "--labels", "a,b"], "--labels: 2 names for 1 runs"),
        ([good] * 7 + ["--out", "a.svg"], "at most 6 runs"),
        ([good], "--out"),
    ]:
        with pytest.raises(SystemExit) as end:
            curves.main(arguments)
        assert end.value.code == 2 and named in capsys.readouterr().err
