"""What a run tells while it runs: metrics.jsonl, TensorBoard events, and a progress display."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a success rate (Wilson 1927), (0, 1) for n = 0.

    With p = successes / n: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). z = 1.96 gives 95 %.
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


class Logger:
    """Writes each row to `run_dir/metrics.jsonl` and `run_dir/tensorboard/`, and shows it.

    `resume_step=None` starts a new run: rows the folder may hold are dropped.
    `resume_step=n` continues a run from its checkpoint of step n: later rows are dropped (the warm start's,
    which counts its own steps, stay), so that the file ends up as if the run had never stopped.
    `display` is "plain" (a line a row), "none", or "auto": a live panel in a terminal, else plain.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        display: str = "auto",
        total_steps: int | None = None,
    ):
        if display not in ("auto", "plain", "none"):
            raise ValueError(f'display must be "auto", "plain" or "none", got {display!r}')
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        history = _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _TensorBoard(self.run_dir / "tensorboard", resume_step)
        self._times: defaultdict[str, float] = defaultdict(float)
        self._display = _make_display(display, self.run_dir.name, total_steps, history)

    def log(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Record one row; the times collected by `stage(...)` since the last one go with it.

        Values are numbers or 0-d tensors; what is not finite is stored as null.
        """
        times = {f"time/{name}": seconds for name, seconds in self._times.items()}
        self._times.clear()
        row = {"step": step, "stage": stage, **{k: _number(k, v) for k, v in {**times, **metrics}.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._tensorboard.add(row)
        self._display.show(row)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; its seconds are added to `time/<name>` of the next row."""
        start = time.perf_counter()
        self._display.busy(name)
        try:
            yield
        finally:
            self._display.busy("")
            self._times[name] += time.perf_counter() - start

    def message(self, text: str) -> None:
        """Say something once, above the progress display."""
        self._display.message(text)

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


def _number(key: str, value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, int):
        return value
    if not isinstance(value, float):
        raise TypeError(f"metric {key!r} must be a number, got {type(value).__name__}")
    return value if math.isfinite(value) else None


def _truncate(path: Path, resume_step: int | None) -> list[dict[str, Any]]:
    """Drop the half-written last line and the rows after `resume_step` (None: all); return what stays."""
    rows = [] if resume_step is None else read_metrics(path)
    rows = [row for row in rows if row["stage"] == "warm_start" or row["step"] <= resume_step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_bytes() != text.encode():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return rows


class _TensorBoard:
    """Event files, if tensorboard is installed. The warm start counts its own steps: a run of its own."""

    def __init__(self, folder: Path, resume_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._new = None
        else:
            purge = 0 if resume_step is None else resume_step + 1
            self._new = lambda run: SummaryWriter(str(folder / run), purge_step=None if run and purge else purge)
        self._writers: dict[str, Any] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        if self._new is None:
            return
        run = "warm_start" if row["stage"] == "warm_start" else ""
        if run not in self._writers:
            self._writers[run] = self._new(run)
        for key, value in row.items():
            if key not in ("step", "stage") and value is not None:
                self._writers[run].add_scalar(key, value, row["step"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


# The displays.


def _make_display(kind: str, name: str, total_steps: int | None, history: list[dict[str, Any]]):
    if kind == "none":
        return _Silent()
    console = Console()
    if kind == "auto" and console.is_terminal and not console.is_dumb_terminal:
        return _Panel(console, name, total_steps, history)
    return _Plain(total_steps)


class _Silent:
    def show(self, row: Mapping[str, Any]) -> None: ...

    def busy(self, name: str) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Plain(_Silent):
    """One line a row, for logs and pipes."""

    def __init__(self, total_steps: int | None):
        self._total = total_steps

    def show(self, row: Mapping[str, Any]) -> None:
        total = f"/{self._total}" if self._total and row["stage"] == "train" else ""
        fields = "  ".join(f"{label} {value}" for label, value in _line(row))
        self.message(f"{row['stage'].replace('_', ' '):<10} {row['step']:>4}{total}  {fields}")

    def message(self, text: str) -> None:
        print(text, file=sys.stdout, flush=True)


def _line(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The labelled values of one plain line: those of the row's stage that are there."""
    if row["stage"] == "eval":
        rate, low, high = (percent(row.get(f"eval/{name}")) for name in ("success", "low", "high"))
        return [("success", f"{rate} [{low}, {high}]"), *_fields(row, _EVAL)]
    return _fields(row, _WARM_START if row["stage"] == "warm_start" else _TRAIN)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """12.3s, 4m05s, 1h23m."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f}s"
    if value < 3600:
        return f"{int(value // 60)}m{int(value % 60):02d}s"
    return f"{int(value // 3600)}h{int(value % 3600 // 60):02d}m"


_WARM_START = [
    ("loss/imitation", "loss", decimal),
    ("warm_start/accuracy", "accuracy", percent),
    ("time/total", "time", seconds),
]
_TRAIN = [
    ("rollout/success", "success", percent),
    ("rollout/segment_length", "segment", decimal),
    ("rollout/switch_rate", "switch", percent),
    ("rollout/valid_rate", "valid", percent),
    ("loss/policy", "policy", decimal),
    ("loss/value", "value", decimal),
    ("loss/kl", "kl", decimal),
    ("time/total", "time", seconds),
]
_EVAL = [
    ("eval/episodes", "episodes", whole),
    ("eval/turns", "turns", decimal),
    ("eval/valid_rate", "valid", percent),
    ("time/eval", "time", seconds),
]


def _fields(row: Mapping[str, Any], wanted: list) -> list[tuple[str, str]]:
    return [(label, form(row[key])) for key, label, form in wanted if key in row]


class _Panel(_Silent):
    """A live panel: where the run stands, how it does, where the time goes."""

    def __init__(self, console: Console, name: str, total_steps: int | None, history: list[dict[str, Any]]):
        self._name, self._total = name, total_steps
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in history:
            self._rows[row["stage"]].append(row)
        self._busy = ""
        self._live = Live(self, console=console, refresh_per_second=2)
        self._live.start()

    def show(self, row: Mapping[str, Any]) -> None:
        self._rows[row["stage"]].append(dict(row))
        self._live.refresh()

    def busy(self, name: str) -> None:
        self._busy = name

    def message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def __rich__(self) -> Panel:
        train, evals, warm = self._rows["train"], self._rows["eval"], self._rows["warm_start"]
        parts = [_header(train[-1]["step"] if train else 0, self._total, _eta(train, self._total))]
        if train or evals:
            parts.append(_success(train, evals))
        if train:
            parts += [_numbers(train[-1]), _times(train[-1], self._busy)]
        elif warm:
            parts.append(_joined([("warm start", str(warm[-1]["step"])), *_fields(warm[-1], _WARM_START)]))
        else:
            parts.append(Text(self._busy or "starting", style="bold cyan"))
        width = min(78, self._live.console.width)
        body = Group(*(line for part in parts for line in (part, Text())))
        title = Text(self._name, style="bold")
        return Panel(
            body,
            title=title,
            title_align="left",
            border_style="bright_black",
            padding=(1, 2, 0, 2),
            width=width,
        )


def _header(step: int, total: int | None, eta: str) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="bold")
    grid.add_column(ratio=1)
    grid.add_column(style="dim", justify="right")
    if total:
        bar = ProgressBar(total=total, completed=step, complete_style="green", finished_style="green")
        grid.add_row(f"update {step} / {total}", bar, eta)
    else:
        grid.add_row(f"update {step}", "", eta)
    return grid


def _eta(train: list[dict[str, Any]], total: int | None) -> str:
    recent = [row["time/total"] for row in train[-5:] if row.get("time/total") is not None]
    left = total - train[-1]["step"] if total and train else 0
    return f"eta {seconds(left * sum(recent) / len(recent))}" if recent and left > 0 else ""


def _success(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(style="bold green", justify="right", width=6)
    grid.add_column(style="green")
    grid.add_column(style="dim")
    if train:
        values = [row.get("rollout/success") for row in train]
        grid.add_row("train success", percent(values[-1]), sparkline(values, 28), "")
    if evals:
        values = [row.get("eval/success") for row in evals]
        bounds = f"{percent(evals[-1].get('eval/low'))} – {percent(evals[-1].get('eval/high'))}"
        grid.add_row("eval success", percent(values[-1]), sparkline(values, 28), bounds)
    return grid


_NUMBERS = [
    [
        ("rollout/segment_length", "segment", decimal),
        ("rollout/switch_rate", "switch", percent),
        ("rollout/valid_rate", "valid", percent),
        ("rollout/turns", "turns", decimal),
    ],
    [
        ("loss/policy", "policy loss", decimal),
        ("loss/value", "value loss", decimal),
        ("loss/kl", "kl", decimal),
        ("loss/entropy", "entropy", decimal),
    ],
    [
        ("loss/clip_fraction", "clipped", percent),
        ("optim/grad_norm", "grad norm", decimal),
        ("optim/skipped_steps", "skipped", whole),
        ("episodes", "episodes", whole),
    ],
]


def _numbers(row: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in _NUMBERS:
        grid.add_column(style="dim", min_width=9)
        grid.add_column(justify="right", min_width=8)
    for cells in zip(*_NUMBERS, strict=True):
        grid.add_row(*(text for key, label, form in cells for text in (label, form(row.get(key)))))
    return grid


def _times(row: Mapping[str, Any], busy: str) -> Text:
    """The last row's seconds by stage; the stage that runs now is bright."""
    stages = [(key.removeprefix("time/"), seconds(row[key])) for key in row if key.startswith("time/")]
    return _joined(stages, bright=busy)


def _joined(fields: list[tuple[str, str]], bright: str = "") -> Text:
    text = Text()
    for label, value in fields:
        style = "bold cyan" if label == bright else "dim"
        text.append(f"{label} ", style=style).append(value).append("   ")
    return text


def sparkline(values: list[float | None], width: int) -> str:
    """The last `width` values, each in 0..1, as block characters; a dot where there is none."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join("·" if v is None else blocks[min(7, max(0, int(8 * v)))] for v in values[-width:])
