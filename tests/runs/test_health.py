"""What a run warns of: each rule by hand, the good runs without a word, and a resumed run word for word."""

import json
import math
import random
import re
from pathlib import Path

import pytest

from hiper_fast.runs import report
from hiper_fast.runs.health import HELD, RULES, Health, Limit, Rule, Watch, find_rules
from hiper_fast.runs.metrics import Logger, read_metrics

ROOT = Path(__file__).parents[2]
GOOD_RUNS = sorted((ROOT / "benchmarks" / "results").glob("*-seed*.jsonl"))

HEALTHY = {
    "rollout/success": 0.5, "rollout/switch_rate": 0.4, "rollout/segment_length": 2.5, "rollout/turns": 12.0,
    "rollout/valid_rate": 0.99, "rollout/near_miss_rate": 0.01, "rollout/groups_alike": 0.3,
    "rollout/truncated_prompts": 0, "rollout/responses_at_limit": 3,
    "value/explained_low": 0.3, "value/explained_high": 0.2, "value/explained_switch": 0.4,
    "loss/policy": -0.01, "loss/kl": 0.02, "loss/clip_fraction": 0.01, "optim/grad_norm": 0.2,
    "policy/entropy_switch": 0.2, "policy/entropy_subgoal": 0.1, "policy/entropy_action": 0.3,
    "fidelity/logprob_mean_abs": 2e-7, "fidelity/outside_clip": 0, "fidelity/tolerance": 1e-3,
    "optim/skipped_steps": 0, "eval/success": 0.5,
}  # fmt: skip
BAD = [  # metric, its bad value, what the message says of it
    ("rollout/switch_rate", 0.97, "0.97, above 0.9 since update"),
    ("rollout/segment_length", 11.5, "0.958, above 0.9 of the episode since update"),
    ("rollout/valid_rate", 0.93, "0.93, more than 0.05 below the first updates since update"),
    ("rollout/near_miss_rate", 0.3, "0.3, above 0.1 since update"),
    ("rollout/success", 0.0, "0, below 0.01 since update"),
    ("rollout/success", 1.0, "1, above 0.99 since update"),
    ("rollout/groups_alike", 0.9, "0.9, above 0.8 since update"),
    ("rollout/truncated_prompts", 20, "0.0208, above 0.01 of the turns since update"),  # of 12 * 80
    ("rollout/responses_at_limit", 60, "0.0625, above 0.05 of the turns since update"),
    ("value/explained_low", -0.1, "-0.1, below 0 since update"),
    ("value/explained_high", -0.1, "-0.1, below 0 since update"),
    ("value/explained_switch", -0.1, "-0.1, below 0 since update"),
    ("loss/kl", 0.5, "0.5, above 0.3 since update"),
    ("policy/entropy_action", 0.001, "0.001, below 0.01 since update"),
    ("policy/entropy_action", 0.7, "0.7, above 0.1 and 2 times the first updates since update"),
    ("loss/clip_fraction", 0.25, "0.25, above 0.2 since update"),
    ("fidelity/logprob_mean_abs", 0.03, "30, above 1 of fidelity/tolerance since update"),
    ("fidelity/outside_clip", 0.02, "0.02, above 0.01 since update"),
    ("optim/grad_norm", 0.0, "0, below 1e-08 since update"),
    ("optim/skipped_steps", 2, "2, above 0 since update"),
    ("eval/success", 0.35, "0.35, more than 0.1 below the best since update"),
]


def make_row(step, **changes):
    changes = {key.replace("__", "/"): value for key, value in changes.items()}
    return {"step": step, "stage": "train", **HEALTHY, "episodes": 80 * step, **changes}


def tell(rows):
    """(step, text) of all that is said."""
    health = Health()
    return [(row["step"], text) for row in rows for text in health.read(row)]


def test_each_kind_of_metric_has_a_bad_value_here():
    tried = {rule for key, value, _ in BAD for rule in find_rules(key)}
    assert tried == set(RULES)


@pytest.mark.parametrize("file", GOOD_RUNS, ids=lambda file: file.stem)
def test_good_runs_are_not_warned_of(file):
    rows = read_metrics(file)
    assert len(rows) > 24 and tell(rows) == []


def test_there_are_good_runs():
    assert len(GOOD_RUNS) == 11


def test_a_healthy_run_is_told_nothing():
    assert tell(make_row(step) for step in range(1, 40)) == []


@pytest.mark.parametrize("key, value, expected", BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_each_rule_speaks_once_when_it_begins_and_once_when_it_has_mended(key, value, expected):
    (rule,) = [r for r in find_rules(key) if r.limit.text in expected]
    ill = range(10, 20)
    rows = [make_row(step, **({key: value} if step in ill else {})) for step in range(1, 40)]
    (began, first), (ended, second) = tell(rows)
    assert (began, ended) == (10 + rule.held - 1, 20 + rule.held - 1)
    assert first.startswith(f"warning: {key} is {expected} 10: ")
    assert rule.wrong in first and rule.cure in first
    assert second.startswith(f"mended: {key} is ") and second.endswith("since update 20")


@pytest.mark.parametrize("key, value, expected", BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_what_does_not_hold_is_not_said(key, value, expected):
    (rule,) = [r for r in find_rules(key) if r.limit.text in expected]
    if rule.held == 1:  # once is enough
        return
    rows = [make_row(step, **({key: value} if step % rule.held else {})) for step in range(10, 40)]
    assert tell([*(make_row(step) for step in range(1, 10)), *rows]) == []


@pytest.mark.parametrize("name", ["truncated_prompts", "responses_at_limit"])
def test_many_that_are_cut_are_told_of_at_once_and_only_once(name):
    rows = [make_row(step, **{f"rollout__{name}": 500}) for step in range(1, 9)]
    ((step, text),) = tell(rows)
    assert step == 1 and text.startswith(f"warning: rollout/{name} is 0.521, above 0.0")
    evaluation = {"step": 0, "stage": "eval", "eval/turns": 12.0, "eval/episodes": 50}
    ((step, text),) = tell([{**evaluation, f"eval/{name}": 600}, *rows[:0]])
    assert step == 0 and text.startswith(f"warning: eval/{name} is 1, above 0.0")
    assert tell([{**evaluation, f"eval/{name}": 3}]) == []


def test_most_responses_without_format_from_the_first_update_on():
    (step, text), *others = tell(make_row(step, rollout__valid_rate=0.4) for step in range(1, 9))
    assert step == HELD and "below 0.5 since update 1: most responses" in text and not others


def test_while_the_critic_trains_alone_the_policys_zeros_are_no_sign():
    """As an update's metrics are then: docs/runs.md."""
    zeros = {
        "loss__policy": 0.0,
        "loss__kl": 0.0,
        "loss__clip_fraction": 0.0,
        "optim__grad_norm": 0.0,
    }
    assert tell(make_row(step, **zeros) for step in range(1, 20)) == []
    trained = {**zeros, "policy__clip_fraction_action": 0.0}  # advantages of 0 for every token
    ((step, text),) = tell(make_row(step, **trained) for step in range(1, 20))
    assert step == HELD and "optim/grad_norm is 0" in text


def test_what_is_not_there_or_not_a_number_counts_neither_way():
    rows = [make_row(step, loss__kl=0.5 if step % 2 else None) for step in range(1, 7)]
    ((step, text),) = tell(rows)
    assert step == 5 and "since update 1" in text
    assert tell({**row, "loss/kl": math.nan} for row in rows) == []
    assert tell({"step": step, "stage": "eval"} for step in range(9)) == []
    assert (
        tell({"step": step, "stage": "warm_start", "loss/imitation": 9.0} for step in range(9))
        == []
    )


def test_sure_switches_and_subgoals_are_no_sign():
    """As a trained tiny policy has them."""
    sure = {"policy__entropy_switch": 0.011, "policy__entropy_subgoal": 0.004}
    assert tell(make_row(step, **(sure if step > 4 else {})) for step in range(1, 20)) == []
    assert (
        tell(make_row(s, policy__entropy_switch=0.02 if s < 5 else 0.09) for s in range(1, 20))
        == []
    )


def test_short_episodes_of_one_subgoal_are_no_sign():
    rows = [make_row(s, rollout__turns=2.0, rollout__segment_length=2.0) for s in range(1, 9)]
    assert tell(rows) == []


def plain_flips(crossed, held):
    """Where the state flips: `held` values in a row, all after the last flip, contradict it."""
    state, last, flips = False, -1, []
    for t in range(len(crossed)):
        window = crossed[t - held + 1 : t + 1]
        if t - held >= last and len(window) == held and all(c != state for c in window):
            state, last = not state, t
            flips.append((t, t - held + 1, state))
    return flips


@pytest.mark.parametrize("held", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_random_values_against_a_plain_search(held, seed):
    rng = random.Random(seed)
    values = [rng.random() ** (1 + t % 7 // 3) for t in range(300)]
    limit = Limit("above 0.4", lambda value, past: value > 0.4)
    watch, found = Watch(Rule("x", limit, "", "", held), "x"), []
    for t, value in enumerate(values):
        text = watch.see(t, value)
        if text:
            since = int(re.search(r"since update (\d+)", text)[1])
            found.append((t, since, text.startswith("warning")))
    assert found == plain_flips([value > 0.4 for value in values], held) and found


def test_alerts_know_when_they_ended():
    health = Health(make_row(step, loss__kl=0.5 if step < 6 else 0.1) for step in range(1, 20))
    (alert,) = health.alerts
    assert (alert.metric, alert.value, alert.since, alert.until) == ("loss/kl", 0.5, 1, 6)


# In a run.


def metrics_of(step):
    """Ill from 3 to 8, and again from 14 on."""
    ill = 3 <= step <= 8 or step >= 14
    return {k: v for k, v in make_row(step, loss__kl=0.5 if ill else 0.02).items()
            if k not in ("step", "stage", "eval/success")}  # fmt: skip


def run(folder, steps, capsys, resume_step=None):
    """What a run of these updates prints, by update."""
    printed = {}
    with Logger(folder, display="plain", resume_step=resume_step) as logger:
        for step in steps:
            logger.log(step, "train", metrics_of(step))
            logger.log(step, "eval", {"eval/success": 0.7 if step < 10 else 0.4})
            printed[step] = capsys.readouterr().out
    return printed


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 9, 10, 11, 15, 17])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(tmp_path, capsys, cut):
    whole = run(tmp_path / "whole", range(1, 20), capsys)
    run(tmp_path / "cut", range(1, cut + 3), capsys)  # killed two updates after its checkpoint
    resumed = run(tmp_path / "cut", range(cut + 1, 20), capsys, resume_step=cut)
    assert resumed == {step: text for step, text in whole.items() if step > cut}
    said = [line for text in whole.values() for line in text.splitlines()
            if line.startswith(("warning: ", "mended: "))]  # fmt: skip
    assert [line.split(" is ")[0] for line in said] == [
        "warning: loss/kl", "mended: loss/kl", "warning: eval/success", "warning: loss/kl",
    ]  # fmt: skip
    files = (tmp_path / name / "metrics.jsonl" for name in ("whole", "cut"))
    assert len({file.read_text() for file in files}) == 1


def test_nothing_is_said_without_a_display(tmp_path, capsys):
    with Logger(tmp_path, display="none") as logger:
        for step in range(1, 10):
            logger.log(step, "train", metrics_of(step))
    assert capsys.readouterr().out == ""


def test_the_report_shows_what_is_wrong_and_what_was(tmp_path, capsys):
    run(tmp_path, range(1, 18), capsys)
    page = report.build(tmp_path).read_text()
    section = page[page.index('id="health"') : page.index('id="tasks"')]
    assert section.count("<tr") == 1 + 3 and section.count('class="mended"') == 1
    assert "3 – 8" in section and "14 – now" in section and "10 – now" in section
    assert "lower train.lr, raise train.kl_coef" in section
    (tmp_path / "metrics.jsonl").write_text(json.dumps(make_row(1)) + "\n")
    assert "Nothing to warn of." in report.build(tmp_path).read_text()


def test_the_table_of_the_docs_is_that_of_the_code():
    text = (ROOT / "docs" / "training.md").read_text()
    section = text[text.index("## What to watch") :]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    told = [
        tuple(cell.strip().replace("`", "") for cell in line.split("|")[1:-1]) for line in lines
    ]
    assert told == [(rule.metric, describe_limits(rule), rule.wrong, rule.cure) for rule in RULES]


def describe_limits(rule):
    text = f"{rule.limit.text}, {rule.held} in a row" if rule.held > 1 else rule.limit.text
    return f"{text}; at once if {rule.at_once.text}" if rule.at_once else text
