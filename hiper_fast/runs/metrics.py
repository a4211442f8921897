"""What a run tells while it runs: metrics.jsonl, TensorBoard events, and a progress display."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hiper_fast.runs.display import DISPLAYS, build_display
from hiper_fast.runs.folder import replace_text
from hiper_fast.runs.health import Health
from hiper_fast.text import clean

SUCCESS = "eval/success/"  # before a task type
OUTCOMES = "eval/won/"  # a task type's games, a character each: 1 won, 0 lost


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
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
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row and "stage" in row:
                rows.append(row)
    return rows


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
    """Writes each row to `run_dir/metrics.jsonl` and `run_dir/tensorboard/`, shows it, and says what is wrong.

    `resume_step=None` starts a new run: rows the folder may hold are dropped.
    `resume_step=n` continues a run from its checkpoint of step n: later rows are dropped (the warm
    start's, which counts its own steps, stay), so that the file ends up as if the run had never
    stopped.
    `display` is "plain" (a line a row), "none", or "panel" or "auto": a live panel in a terminal,
    else plain.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        display: str = "auto",
        total_steps: int | None = None,
    ):
        if display not in DISPLAYS:
            raise ValueError(f"display must be one of {', '.join(DISPLAYS)}, got {display!r}")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        history = _drop_rows_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(self.run_dir / "tensorboard", resume_step)
        self._times: defaultdict[str, float] = defaultdict(float)
        self._display = build_display(display, self.run_dir.name, total_steps, history)
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
        self._tensorboard.add(row)
        self._display.show(row)
        for text in self._health.read(row):
            self.message(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; its seconds are added to `time/<name>` of the next row."""
        start = time.perf_counter()
        self._display.show_stage(name)
        try:
            yield
        finally:
            self._display.show_stage("")
            self._times[name] += time.perf_counter() - start

    def message(self, text: str) -> None:
        """Say something once, above the progress display."""
        self._display.show_message(clean(text))

    def close(self) -> None:
        self._display.close()
        self._tensorboard.close()
        self._file.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Muted:
    """Stands for the logger in every process but the first."""

    def log(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def stage(self, name: str) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def __enter__(self) -> Muted:
        return self

    def __exit__(self, *exception: object) -> None: ...


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


class TensorBoard:
    """Event files, if tensorboard is installed; the warm start has its own steps: a run apart."""

    def __init__(self, folder: Path, resume_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            SummaryWriter = None
        self._writer_type = SummaryWriter
        self._folder = folder
        self._first_step = 0 if resume_step is None else resume_step + 1
        self._writers: dict[str, Any] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        if self._writer_type is None:
            return
        writer = self._open_writer("warm_start" if row["stage"] == "warm_start" else "")
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                writer.add_scalar(key, value, row["step"])

    def _open_writer(self, run: str) -> Any:
        if run not in self._writers:
            purge = None if run and self._first_step else self._first_step
            self._writers[run] = self._writer_type(str(self._folder / run), purge_step=purge)
        return self._writers[run]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
