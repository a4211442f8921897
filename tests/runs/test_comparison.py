"""Results from made-up runs: turns, equal turns, differences and verdicts by hand; the page and its text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import Page

from hiper_fast.options import ConfigError
from hiper_fast.runs.comparison import Question, compare, read_record
from hiper_fast.runs.comparison_page import build_tables, tell_findings, write_page
from hiper_fast.runs.metrics import count_turns

pytest.importorskip("scipy")

EVIL = '<script>alert("x")</script> | &'


def write_run(folder: Path, panels, lengths, episodes=10) -> Path:
    """A run with an evaluation before the first and after each update.

    panels: each evaluation's games, by task type; lengths: each update's turns an episode.
    """
    rows = []
    for step, panel in enumerate(panels):
        if step:
            turns = {"rollout/turns": lengths[step - 1], "episodes": step * episodes}
            rows.append({"step": step, "stage": "train", "time/total": 60.0, **turns})
        games = "".join(panel.values())
        row = {"step": step, "stage": "eval", "time/eval": 30.0}
        row["eval/success"] = games.count("1") / len(games)
        rows.append(row | {f"eval/won/{name}": won for name, won in sorted(panel.items())})
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def panel(won: int, games: int = 10) -> dict[str, str]:
    """Games of two types, the first `won` of them won."""
    text = "1" * won + "0" * (games - won)
    return {"look": text[:4], "put": text[4:]}


@pytest.fixture
def study(tmp_path):
    """Two seeds each of: A, from 2 to 6 of 10 in 100 turns; B, from 2 to 4 and 5 in 200 turns."""
    folders = {"A": {}, "B": {}}
    for seed in (0, 1):
        folders["A"][seed] = write_run(tmp_path / f"a{seed}", [panel(2), panel(6)], [10])
        last = panel(8 + seed)
        folders["B"][seed] = write_run(tmp_path / f"b{seed}", [panel(2), panel(4), last], [5, 15])
    return folders


def complete(results: dict) -> dict:
    """With what the command adds."""
    options = {
        arm: {"env.name": "household", "train.updates": 2, "advantage.estimator": arm}
        for arm in results["arms"]
    }
    added = {"study": "st", "seeds": [0, 1], "unfinished": [], "panel": {"panel": "test"}}
    return results | added | {"options": options, "made_with": {"torch": "2"}}


def test_turns_add_up():
    rows = [
        {"step": 1, "stage": "train", "rollout/turns": 7.5, "episodes": 8},
        {"step": 1, "stage": "eval"},
        {"step": 2, "stage": "train", "rollout/turns": 4.25, "episodes": 16},
    ]
    assert count_turns(rows) == {0: 0, 1: 60, 2: 94}


def test_a_run(study):
    record, types = read_record(study["B"][1], 1)
    assert types == ["look"] * 4 + ["put"] * 6
    assert record.updates == [0, 1, 2] and record.turns == [0, 50, 200]
    assert record.minutes == pytest.approx([0.5, 2.0, 3.5])
    assert record.rates == pytest.approx([0.2, 0.4, 0.9])
    assert record.outcomes[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_equal_turns_by_hand(study):
    """After 100 turns B is a third of the way from 0.4 to 0.8 and to 0.9."""
    results = compare(study, Question("A"))
    assert results["turns"] == 100 and results["threshold"] == pytest.approx(0.4)
    a, b = results["arms"]["A"], results["arms"]["B"]
    assert a["equal"]["value"] == a["last"]["value"] == a["tail"]["value"] == pytest.approx(0.6)
    assert b["equal"]["value"] == pytest.approx((0.4 + 0.4 / 3 + 0.4 + 0.5 / 3) / 2)
    assert b["last"]["value"] == pytest.approx(0.85) and b["start"]["value"] == pytest.approx(0.2)
    assert b["tail"]["value"] == pytest.approx((0.4 + 0.8 + 0.4 + 0.9) / 4)
    for arm in (a, b):
        assert arm["turns_to_threshold"]["each"] == pytest.approx([50, 50])
        assert arm["turns_to_threshold"]["median"] == pytest.approx(50)
    against = b["against"]
    assert against["each"] == pytest.approx([0.4 + 0.4 / 3 - 0.6, 0.4 + 0.5 / 3 - 0.6])
    assert against["improvement"]["value"] == 0 and against["verdict"] == "not told apart"
    # by type: all of look are won at 0.4 already
    assert b["types"]["look"]["value"] == 1 and a["types"]["put"]["value"] == pytest.approx(2 / 6)
    assert b["types"]["put"]["value"] == pytest.approx((4 / 6 / 3 + 5 / 6 / 3) / 2)


@pytest.mark.parametrize(
    ("measure", "tail", "expected"),
    [("last", 3, [0.2, 0.3]), ("tail", 1, [0.2, 0.3]), ("tail", 2, [0.0, 0.05]), ("tail", 9, [0.0, 0.05])],
)  # fmt: skip
def test_other_measures(study, measure, tail, expected):
    results = compare(study, Question("A", measure, tail))
    assert results["arms"]["B"]["against"]["each"] == pytest.approx(expected)
    swapped = compare(study, Question("B", measure, tail))
    assert swapped["arms"]["A"]["against"]["each"] == pytest.approx([-gap for gap in expected])


def write_study(tmp_path, gaps):
    """Arms that end with 40 of 100 games, and with so many more, seed by seed."""
    ends = {"A": [40] * len(gaps), "B": [40 + gap for gap in gaps]}
    return {
        arm: {
            seed: write_run(tmp_path / f"{arm}{seed}", [panel(20, 100), panel(won, 100)], [10])
            for seed, won in enumerate(wins)
        }
        for arm, wins in ends.items()
    }


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([9, 11], "not told apart"),  # 10 +- 12.7
        ([10, 11, 12], "better"),  # 11 +- 2.5
        ([-10, -11, -12], "worse"),
        ([1, 11, 12], "not told apart"),  # 8 +- 15
        ([10, 10, 10], "not told apart"),  # no interval
        ([10], "not told apart"),
    ],
)
def test_verdicts(tmp_path, gaps, verdict):
    against = compare(write_study(tmp_path, gaps), Question("A"))["arms"]["B"]["against"]
    assert against["verdict"] == verdict
    assert against["difference"]["value"] == pytest.approx(np.mean(gaps) / 100)
    if len(set(gaps)) == 1:
        assert against["least_visible"] is None and against["difference"]["low"] is None
    else:
        half = (against["difference"]["high"] - against["difference"]["low"]) / 2
        assert against["least_visible"] == pytest.approx(half) and half > 0


def test_curves_go_as_far_as_all_seeds(study, tmp_path):
    study["B"][2] = write_run(tmp_path / "b2", [panel(2), panel(4)], [8])
    curves = compare(study, Question("A"))["arms"]["B"]["curves"]
    assert [point["x"] for point in curves["turns"]] == [
        point["x"] for point in compare(study, Question("A"))["arms"]["A"]["curves"]["turns"]
    ]
    drawn = {point["x"]: point["value"] for point in curves["turns"] if "value" in point}
    assert min(drawn) == 0 and max(drawn) == 80
    # two seeds a fifth of the way after update 1, the third at its end
    assert drawn[80] == pytest.approx((0.4 + 0.2 * 0.4 + 0.4 + 0.2 * 0.5 + 0.4) / 3)
    assert [point["x"] for point in curves["updates"] if "value" in point] == [0, 1]


def test_a_threshold_that_some_do_not_reach(study):
    arms = compare(study, Question("A", threshold=0.85))["arms"]
    assert arms["A"]["turns_to_threshold"] == {"each": [None, None], "median": None}
    each = arms["B"]["turns_to_threshold"]
    assert each["each"][0] is None and each["each"][1] == pytest.approx(50 + 150 * 0.9)
    assert each["median"] is None


def test_seeds_and_arms_that_are_not_finished(study):
    del study["B"][0]
    arms = compare(study | {"C": {}}, Question("A"))["arms"]
    assert list(arms) == ["A", "B"] and arms["B"]["seeds"] == [1]
    assert arms["B"]["against"]["seeds"] == [1] and len(arms["B"]["against"]["each"]) == 1
    del study["A"][1]
    results = compare(study, Question("A"))
    assert results["arms"]["B"]["against"] is None
    assert "B: no seed in common with A." in tell_findings(complete(results))


def test_errors(study, tmp_path):
    with pytest.raises(ConfigError, match="no run of 'A' is finished yet"):
        compare({"A": {}, "B": study["B"]}, Question("A"))
    write_run(tmp_path / "c0", [panel(2), panel(3)], [9])
    file = tmp_path / "c0" / "metrics.jsonl"
    file.write_text(re.sub(r', "eval/won/\w+": "\d+"', "", file.read_text()))
    with pytest.raises(ConfigError, match="c0: its evaluations tell no single games"):
        compare(study | {"C": {0: tmp_path / "c0"}}, Question("A"))
    write_run(tmp_path / "d0", [panel(2, 11), panel(3, 11)], [9])
    with pytest.raises(ConfigError, match="d0: it was evaluated on other games"):
        compare(study | {"D": {0: tmp_path / "d0"}}, Question("A"))


def test_results_hold_every_game(study):
    results = json.loads(json.dumps(compare(study, Question("A")), allow_nan=False))
    run = results["arms"]["B"]["runs"][1]
    assert (run["seed"], run["folder"]) == (1, "b1")
    assert run["evaluations"][2] == {
        "update": 2,
        "turns": 200,
        "minutes": pytest.approx(3.5),
        "success": pytest.approx(0.9),
        "types": {"look": 1.0, "put": pytest.approx(5 / 6)},
        "won": {"look": "1111", "put": "111110"},
    }
    assert results["games"] == {"look": 4, "put": 6}


def test_the_page_and_its_text(study, tmp_path):
    results = complete(compare({EVIL: study["A"], "B": study["B"]}, Question(EVIL)))
    target = write_page(results, tmp_path)
    text = target.read_text()
    page = Page(text)
    assert target == tmp_path / "report.html" and f"B against {EVIL}:" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1 and "<script>alert" not in text
    assert not re.search(r"""(src|href)=|@import|url\(""", text)
    charts = [own for tag, own in page.tags if tag == "figure"]
    bands = [own["class"] for _, own in page.tags if own.get("class", "").startswith("band")]
    assert len(charts) == 3 and set(bands) == {"band arm1"}  # the first arm's seeds are alike
    hover = json.loads(charts[0]["data-hover"])
    assert len(hover["x"]) == len(hover["text"]) and hover["text"][0].startswith("0 turns\n")
    for x, y in re.findall(
        r"([\d.-]+),([\d.-]+)", " ".join(own.get("points", "") for _, own in page.tags)
    ):
        assert 0 <= float(x) <= 1040 and 0 <= float(y) <= 320
    markdown = (tmp_path / "results.md").read_text()
    assert "nan" not in markdown and "None" not in markdown
    for table in build_tables(results):
        for row in table.rows:
            cells = [cell.replace("|", "\\|") for cell in row]
            assert f"| {' | '.join(cells)} |" in markdown and len(row) == len(table.header)


def test_what_the_text_says(tmp_path):
    results = complete(compare(write_study(tmp_path, [10, 11, 12]), Question("A")))
    [line] = tell_findings(results)
    assert line == (
        "B against A: +11.0 (+8.5 to +13.5) points, better. Gaps of less than about 2.5 points would not show."
    )
    results["unfinished"] = ["B, seed 3", "A, seed 4"]
    assert tell_findings(results)[1] == "Unfinished, and so left out: B, seed 3; A, seed 4."
    same = complete(compare(write_study(tmp_path / "same", [10, 10]), Question("A")))
    assert tell_findings(same) == [
        "B against A: +10.0 points, not told apart. These seeds give no interval, so they can tell no gap."
    ]
    success = build_tables(results)[0]
    assert success.rows[1][2:4] == ["20.0 %", "51.0 % (48.5 – 53.5)"]
