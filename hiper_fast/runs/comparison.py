"""What the runs of a study say together: curves over seeds, success at equal turns, differences.

Only finished runs are read. All figures come from evaluations on the panel; between two of them outcomes are
interpolated game by game. The best evaluation is never picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiper_fast.options import ConfigError
from hiper_fast.runs.metrics import OUTCOMES, add_minutes, count_turns, read_metrics
from hiper_fast.runs.statistics import (
    Estimate,
    bootstrap,
    estimate_mean,
    find_crossing,
    interpolate,
    interquartile_mean,
    probability_of_improvement,
)

MEASURES = "equal", "last", "tail"  # at equal turns, of the last evaluation, of the last few
AXES = "turns", "updates", "minutes"
CURVE_POINTS = 49
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the runs."""

    reference: str  # the arm that the others are compared with
    measure: str = "equal"
    tail: int = 3  # evaluations that the mean of the last ones takes
    threshold: float | None = None  # success whose turns are told; None: halfway


@dataclass(frozen=True, slots=True)
class Record:
    """A finished run's evaluations, n of them."""

    seed: int
    folder: str
    updates: list[int]  # [n]
    turns: list[int]  # [n] played in training until then
    minutes: list[float]  # [n] of wall time, the evaluation's own included
    outcomes: np.ndarray  # float64 [n, games]

    @property
    def rates(self) -> np.ndarray:
        return self.outcomes.mean(1)  # [n]


Records = Mapping[str, Sequence[Record]]  # arm -> its finished runs


def read_record(folder: Path, seed: int) -> tuple[Record, list[str]]:
    """A run, and the task type of each game [games]. ConfigError if it tells no single games."""
    rows = add_minutes(read_metrics(folder / "metrics.jsonl"))
    evaluations = list({row["step"]: row for row in rows if row["stage"] == "eval"}.values())
    if not evaluations:
        raise ConfigError(f"{folder}: it has no evaluation yet")
    names = [key.removeprefix(OUTCOMES) for key in evaluations[-1] if key.startswith(OUTCOMES)]
    if not names:
        raise ConfigError(f"{folder}: its evaluations tell no single games ({OUTCOMES}…)")
    turns = count_turns(rows)
    record = Record(
        seed,
        folder.name,
        updates=[row["step"] for row in evaluations],
        turns=[turns[row["step"]] for row in evaluations],
        minutes=[row["minutes"] for row in evaluations],
        outcomes=np.array([read_outcomes(row, names) for row in evaluations]),
    )
    types = [name for name in names for _ in evaluations[-1][OUTCOMES + name]]
    return record, types


def read_outcomes(row: Row, names: list[str]) -> list[float]:
    return [float(game) for name in names for game in row[OUTCOMES + name]]


def read_records(folders: Mapping[str, Mapping[int, Path]]) -> tuple[Records, list[str]]:
    """Arm -> seed -> run folder, as records; and the task type of each game, the same in all runs."""
    records: dict[str, list[Record]] = {}
    panel: list[str] | None = None
    for arm, runs in folders.items():
        records[arm] = []
        for seed, folder in runs.items():
            record, types = read_record(folder, seed)
            panel = panel or types
            if types != panel:
                raise ConfigError(f"{folder}: it was evaluated on other games than the runs before")
            records[arm].append(record)
    return records, panel or []


def compare(folders: Mapping[str, Mapping[int, Path]], question: Question) -> Row:
    """Everything that the runs say, as plain data: `results.json` but for what was run and where.

    `folders`: arm -> seed -> folder of a finished run; arms without any are left out.
    """
    records, types = read_records({arm: runs for arm, runs in folders.items() if runs})
    if question.reference not in records:
        raise ConfigError(
            f"no run of {question.reference!r} is finished yet; nothing to compare with"
        )
    turns = min(record.turns[-1] for runs in records.values() for record in runs)
    threshold = question.threshold
    if threshold is None:
        threshold = find_halfway(records[question.reference], turns)
    measured = {arm: measure(runs, question, turns) for arm, runs in records.items()}
    arms = {}
    for arm, runs in records.items():
        arms[arm] = summarise_arm(runs, question, turns, threshold)
        arms[arm] |= summarise_measured(measured[arm], types)
        arms[arm]["curves"] = draw_curves(records, arm)
        arms[arm]["runs"] = [describe(record, types) for record in runs]
        if arm != question.reference:
            arms[arm]["against"] = compare_arm(records, measured, arm, question.reference, types)
    return {
        "reference": question.reference,
        "measure": question.measure,
        "tail": question.tail,
        "turns": turns,
        "threshold": threshold,
        "games": {name: types.count(name) for name in sorted(set(types))},
        "arms": arms,
    }


def find_halfway(runs: Sequence[Record], turns: int) -> float:
    """The success halfway from the start to that after `turns`, of the mean over seeds."""
    ends = [(run.rates[0], interpolate(run.turns, run.rates, turns)) for run in runs]
    return float(np.mean(ends))


def measure(runs: Sequence[Record], question: Question, turns: int) -> dict[int, np.ndarray]:
    """Seed -> outcomes [games] of what is compared."""
    return {run.seed: measure_run(run, question.measure, question.tail, turns) for run in runs}


def measure_run(run: Record, what: str, tail: int, turns: int) -> np.ndarray:
    if what == "equal":
        return interpolate(run.turns, run.outcomes, turns)
    if what == "last":
        return run.outcomes[-1]
    trained = run.outcomes[1:] if len(run.outcomes) > 1 else run.outcomes
    return trained[-tail:].mean(0)


def summarise_arm(
    runs: Sequence[Record], question: Question, turns: int, threshold: float
) -> dict[str, Any]:
    """Means over seeds, each with its interval, and what it took."""
    reached = [find_crossing(run.turns, run.rates, threshold) for run in runs]
    median = float(np.median([np.inf if at is None else at for at in reached]))
    means = {
        what: estimate_mean([measure_run(run, what, question.tail, turns).mean() for run in runs])
        for what in MEASURES
    }
    return {
        "seeds": [run.seed for run in runs],
        "start": tell(estimate_mean([run.rates[0] for run in runs])),
        **{what: tell(mean) for what, mean in means.items()},
        "turns_to_threshold": {"each": reached, "median": median if np.isfinite(median) else None},
        "turns": [run.turns[-1] for run in runs],
        "minutes": [run.minutes[-1] for run in runs],
    }


def summarise_measured(measured: Mapping[int, np.ndarray], types: Sequence[str]) -> dict[str, Any]:
    outcomes = np.stack(list(measured.values()))  # [seeds, games]
    masks = {name: np.array(types) == name for name in sorted(set(types))}
    by_type = {name: estimate_mean(outcomes[:, mask].mean(1)) for name, mask in masks.items()}
    return {
        "iqm": tell(bootstrap(interquartile_mean, types, outcomes)),
        "types": {name: tell(estimate) for name, estimate in by_type.items()},
    }


def compare_arm(
    records: Records,
    measured: Mapping[str, Mapping[int, np.ndarray]],
    arm: str,
    reference: str,
    types: Sequence[str],
) -> dict[str, Any] | None:
    """An arm against the reference, over the seeds that both have finished; None: there are none."""
    seeds = [seed for seed in measured[arm] if seed in measured[reference]]
    if not seeds:
        return None
    ours, theirs = (np.stack([measured[name][seed] for seed in seeds]) for name in (arm, reference))
    each = (ours - theirs).mean(1)
    difference = estimate_mean(each)
    verdict = "not told apart"
    if difference.excludes_zero:
        verdict = "better" if difference.value > 0 else "worse"
    return {
        "seeds": seeds,
        "difference": tell(difference),
        "each": each.tolist(),
        "least_visible": difference.half_width,
        "improvement": tell(bootstrap(probability_of_improvement, types, ours, theirs)),
        "verdict": verdict,
    }


def draw_curves(records: Records, arm: str) -> dict[str, list[dict[str, Any]]]:
    """Axis -> points of the arm's mean curve, as far as all of its seeds go; x is the same for all arms."""
    curves = {}
    for axis in AXES:
        last = max(getattr(run, axis)[-1] for runs in records.values() for run in runs)
        first = max(getattr(run, axis)[0] for run in records[arm])
        end = min(getattr(run, axis)[-1] for run in records[arm])
        curves[axis] = [
            {"x": x, **tell(estimate_at(records[arm], axis, x))} if first <= x <= end else {"x": x}
            for x in place_points(records, axis, last)
        ]
    return curves


def place_points(records: Records, axis: str, last: float) -> list[float]:
    """Where curves are drawn: at every evaluation's update, else evenly and at the ends of all arms."""
    if axis == "updates":
        return sorted({step for runs in records.values() for run in runs for step in run.updates})
    ends = [min(getattr(run, axis)[-1] for run in runs) for runs in records.values()]
    starts = [max(getattr(run, axis)[0] for run in runs) for runs in records.values()]
    return sorted({*np.linspace(0, last, CURVE_POINTS).tolist(), *map(float, [*starts, *ends])})


def estimate_at(runs: Sequence[Record], axis: str, x: float) -> Estimate:
    return estimate_mean([interpolate(getattr(run, axis), run.rates, x) for run in runs])


def describe(record: Record, types: Sequence[str]) -> dict[str, Any]:
    """A run as plain data."""
    masks = {name: np.array(types) == name for name in sorted(set(types))}
    evaluations = [
        {
            "update": update,
            "turns": turns,
            "minutes": minutes,
            "success": float(outcomes.mean()),
            "types": {name: float(outcomes[mask].mean()) for name, mask in masks.items()},
            "won": {
                name: "".join(str(int(won)) for won in outcomes[mask])
                for name, mask in masks.items()
            },
        }
        for update, turns, minutes, outcomes in zip(
            record.updates, record.turns, record.minutes, record.outcomes, strict=True
        )
    ]
    return {"seed": record.seed, "folder": record.folder, "evaluations": evaluations}


def tell(estimate: Estimate) -> dict[str, float | None]:
    return estimate._asdict()
