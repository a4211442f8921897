"""What a run tells while it runs: metrics.jsonl, what tracks it elsewhere, and a progress display."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiper_fast.runs.display import DISPLAYS, SilentDisplay, build_display
from hiper_fast.runs.folder import replace_text
from hiper_fast.runs.health import Health
from hiper_fast.runs.trackers import Tracker, start_trackers
from hiper_fast.text import clean

SUCCESS = "eval/success/"  # before a task type
OUTCOMES = "eval/won/"  # a task type's games, a character each: 1 won, 0 lost


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a success rate (Wilson 1927), (0, 1) for n = 0.

    With p = successes / n: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z = 1.96 gives 95 %.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of n = {n}")
    if n == 0:
        return 0.0, 1.0
    rate, square = successes / n, z * z / n
    middle = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / n + square / (4 * n)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl (no file: none); a half-written last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(_read_row, lines) if row is not None]


def find_damage(path: str | Path, step: int) -> str | None:
    """What a metrics.jsonl lacks of the updates until `step`, in words; None if nothing, or if there is no file."""
    path = Path(path)
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines[:-1], 1):  # the last one may be cut short: a kill does that
        if _read_row(line) is None:
            return f"line {number} is no row of metrics"
    there = {row["step"] for row in read_metrics(path) if row["stage"] == "train"}
    missing = next((number for number in range(1, step + 1) if number not in there), None)
    return None if missing is None else f"update {missing} is missing, of {step} that were made"


def add_minutes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the run's wall time at its end, as far as it was timed, under `minutes`."""

    def seconds(row: dict[str, Any], name: str) -> float:
        return row.get(f"time/{name}") or 0.0

    past, imitation, timed = 0.0, 0.0, []
    for row in rows:
        if row["stage"] == "warm_start":
            past += seconds(row, "demonstrations")
            imitation = seconds(row, "total")  # counted from the beginning of imitation
        else:
            past += seconds(row, "eval" if row["stage"] == "eval" else "total")
        timed.append({**row, "minutes": (past + imitation) / 60})
    return timed


def count_turns(rows: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Update -> turns played in training until its end."""
    turns, total, episodes = {0: 0}, 0.0, 0
    for row in rows:
        if row["stage"] == "train":
            total += row["rollout/turns"] * (row["episodes"] - episodes)
            episodes = row["episodes"]
            turns[row["step"]] = round(total)
    return turns


def list_success(row: Mapping[str, Any]) -> list[tuple[str, float, int, float, float]]:
    """An evaluation by task type, then "all": name, success, games, and its Wilson 95 % interval."""
    names = [key.removeprefix(SUCCESS) for key in row if key.startswith(SUCCESS)]
    rates = [(name, row[SUCCESS + name], row[f"eval/episodes/{name}"]) for name in names]
    rates.append(("all", row["eval/success"], row["eval/episodes"]))
    return [(name, rate, n, *wilson(round(rate * n), n)) for name, rate, n in rates]


class Logger:
    """Writes each row to `run_dir/metrics.jsonl` and to the trackers, shows it, and says what is wrong.

    `resume_step=None` starts a new run: rows the folder may hold are dropped.
    `resume_step=n` continues a run from its checkpoint of step n: later rows are dropped (the warm
    start's, which counts its own steps, stay), so that the file ends up as if the run had never
    stopped.
    `display` is "plain" (a line a row), "none", or "panel" or "auto": a live panel in a terminal,
    else plain. `track` names trackers, which get the `options` and the last evaluation too; one that fails is
    said and left out: metrics.jsonl is the record.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        display: str = "auto",
        total_steps: int | None = None,
        track: Sequence[str] = ("tensorboard",),
        options: Mapping[str, Any] | None = None,
    ):
        if display not in DISPLAYS:
            raise ValueError(f"display must be one of {', '.join(DISPLAYS)}, got {display!r}")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        history = _drop_rows_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = start_trackers(track, self.run_dir, resume_step, options or {})
        self._last_eval = next((row for row in reversed(history) if row["stage"] == "eval"), None)
        self._times: defaultdict[str, float] = defaultdict(float)
        self._display = build_display(display, str(self.run_dir), total_steps, history)
        self._health = Health(history)

    def log(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Record one row; the times collected by `stage(...)` since the last one go with it.

        Values are numbers or 0-d tensors, and text under `eval/won/`; what is not finite is stored as
        null.
        """
        times = {f"time/{name}": seconds for name, seconds in self._times.items()}
        self._times.clear()
        values = {key: _read_value(key, value) for key, value in {**times, **metrics}.items()}
        row = {"step": step, "stage": stage, **values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last_eval = row if stage == "eval" else self._last_eval
        self._tell_trackers(lambda tracker: tracker.add(row))
        self._show("show", row)
        for text in self._health.read(row):
            self.message(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; its seconds are added to `time/<name>` of the next row."""
        start = time.perf_counter()
        self._show("show_stage", name)
        try:
            yield
        finally:
            self._show("show_stage", "")
            self._times[name] += time.perf_counter() - start

    def message(self, text: str) -> None:
        """Say something once, above the progress display."""
        self._show("show_message", clean(text))

    def sync(self) -> None:
        """Waits until all rows are on the disk: a checkpoint never outlives what led to it."""
        os.fsync(self._file.fileno())

    def _show(self, what: str, *content: Any) -> None:
        try:
            getattr(self._display, what)(*content)
        except OSError:  # a terminal or a pipe that is gone ends no run
            self._display = SilentDisplay()
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)  # where what is still in the buffer goes

    def _tell_trackers(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # whatever a foreign package raises: the run goes on
                del self._trackers[name]
                self.message(f"run.track: {name} failed, and the run goes on without it: {error}")

    def close(self, *, failed: bool = False) -> None:
        row = self._last_eval or {}
        table = list_success(row) if row.get("eval/episodes") else []
        self._tell_trackers(lambda tracker: tracker.close(table, failed=failed))
        self._show("close")
        self._file.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        self.close(failed=kind is not None)


class Muted:
    """Stands for the logger in every process but the first."""

    def log(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def stage(self, name: str) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def __enter__(self) -> Muted:
        return self

    def __exit__(self, *exception: object) -> None: ...


def _read_row(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "stage" in row:
            return row
    return None


def _read_value(key: str, value: Any) -> int | float | str | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, str if key.startswith(OUTCOMES) else int):
        return value
    if not isinstance(value, float):
        raise TypeError(f"metric {key!r} must be a number, got {type(value).__name__}")
    return value if math.isfinite(value) else None


def _drop_rows_after(path: Path, resume_step: int | None) -> list[dict[str, Any]]:
    """Drop a half-written line and the rows after `resume_step` (None: all); return the rest."""
    rows = [] if resume_step is None else read_metrics(path)
    rows = [row for row in rows if row["stage"] == "warm_start" or row["step"] <= resume_step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_bytes() != text.encode():
        replace_text(path, text)
    return rows
