"""How a run shows its progress: nothing, one line a row, or a live panel."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hiper_fast.runs.formats import format_decimal, format_percent, format_seconds, format_whole
from hiper_fast.runs.health import read_learned

DISPLAYS = ("auto", "panel", "plain", "none")
PANEL_WIDTH = 78  # columns
REFRESHES = 2  # per second
SPARKLINE_WIDTH = 28
BLOCKS = "▁▂▃▄▅▆▇█"
RECENT_UPDATES = 5  # whose mean time tells the time left

Row = Mapping[str, Any]
Field = tuple[str, str, Callable[[Any], str]]  # a row's key, its label, and how to format its value

WARM_START: list[Field] = [
    ("loss/imitation", "loss", format_decimal),
    ("warm_start/accuracy", "accuracy", format_percent),
    ("time/total", "time", format_seconds),
]
TRAIN: list[Field] = [
    ("rollout/success", "success", format_percent),
    ("rollout/segment_length", "segment", format_decimal),
    ("rollout/switch_rate", "switch", format_percent),
    ("rollout/valid_rate", "valid", format_percent),
    ("loss/policy", "policy", format_decimal),
    ("loss/value", "value", format_decimal),
    ("loss/kl", "kl", format_decimal),
    ("time/total", "time", format_seconds),
]
EVAL: list[Field] = [
    ("eval/episodes", "episodes", format_whole),
    ("eval/turns", "turns", format_decimal),
    ("eval/valid_rate", "valid", format_percent),
    ("time/eval", "time", format_seconds),
]
PANEL_COLUMNS: list[list[Field]] = [
    [
        ("rollout/segment_length", "segment", format_decimal),
        ("rollout/switch_rate", "switch", format_percent),
        ("rollout/valid_rate", "valid", format_percent),
        ("rollout/turns", "turns", format_decimal),
    ],
    [
        ("loss/policy", "policy loss", format_decimal),
        ("loss/value", "value loss", format_decimal),
        ("loss/kl", "kl", format_decimal),
        ("loss/entropy", "entropy", format_decimal),
    ],
    [
        ("loss/clip_fraction", "clipped", format_percent),
        ("optim/grad_norm", "grad norm", format_decimal),
        ("optim/skipped_steps", "skipped", format_whole),
        ("episodes", "episodes", format_whole),
    ],
]


class SilentDisplay:
    def show(self, row: Row) -> None: ...

    def show_stage(self, name: str) -> None: ...

    def show_message(self, text: str) -> None: ...

    def close(self) -> None: ...


class LineDisplay(SilentDisplay):
    """One line a row, for logs and pipes."""

    def __init__(self, total_steps: int | None):
        self._total_steps = total_steps

    def show(self, row: Row) -> None:
        total = f"/{self._total_steps}" if self._total_steps and row["stage"] == "train" else ""
        fields = "  ".join(f"{label} {value}" for label, value in _format_row(row))
        stage = row["stage"].replace("_", " ")
        self.show_message(f"{stage:<10} {row['step']:>4}{total}  {fields}")

    def show_message(self, text: str) -> None:
        print(text, file=sys.stdout, flush=True)


class PanelDisplay(SilentDisplay):
    """A live panel: where the run stands, how it does, where the time goes."""

    def __init__(self, console: Console, folder: str, total_steps: int | None, history: list[Row]):
        self._folder, self._total_steps = folder, total_steps
        self._rows: defaultdict[str, list[Row]] = defaultdict(list)
        for row in history:
            self._rows[row["stage"]].append(row)
        self._stage = ""
        self._live = Live(self, console=console, refresh_per_second=REFRESHES)
        self._live.start()

    def show(self, row: Row) -> None:
        self._rows[row["stage"]].append(dict(row))
        self._live.refresh()

    def show_stage(self, name: str) -> None:
        self._stage = name

    def show_message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def __rich__(self) -> Panel:
        train, evals, warm = self._rows["train"], self._rows["eval"], self._rows["warm_start"]
        parts = [_draw_header(train, self._total_steps)]
        if train or evals:
            parts.append(_draw_success(train, evals))
        if train:
            parts += [_draw_numbers(train[-1]), _draw_times(train[-1], self._stage)]
        elif warm:
            fields = [("warm start", str(warm[-1]["step"])), *_format_fields(warm[-1], WARM_START)]
            parts.append(_join_fields(fields))
        else:
            parts.append(Text(self._stage or "starting", style="bold cyan"))
        return Panel(
            Group(*(line for part in parts for line in (part, Text()))),
            title=Text(self._folder, style="bold"),
            title_align="left",
            border_style="bright_black",
            padding=(1, 2, 0, 2),
            width=min(PANEL_WIDTH, self._live.console.width),
        )


def build_display(
    kind: str, folder: str, total_steps: int | None, history: list[Row]
) -> SilentDisplay:
    if kind == "none":
        return SilentDisplay()
    console = Console()
    if kind != "plain" and console.is_terminal and not console.is_dumb_terminal:
        return PanelDisplay(console, folder, total_steps, history)
    return LineDisplay(total_steps)


def draw_sparkline(values: list[float | None], width: int) -> str:
    """The last `width` values, each in 0..1, as block characters; a dot where there is none."""
    return "".join("·" if value is None else _choose_block(value) for value in values[-width:])


def _choose_block(value: float) -> str:
    return BLOCKS[min(len(BLOCKS) - 1, max(0, int(len(BLOCKS) * value)))]


def _format_row(row: Row) -> list[tuple[str, str]]:
    """The labelled values of one plain line: those of the row's stage that are there."""
    if row["stage"] != "eval":
        return _format_fields(row, WARM_START if row["stage"] == "warm_start" else TRAIN)
    rate, low, high = (
        format_percent(row.get(f"eval/{name}")) for name in ("success", "low", "high")
    )
    return [("success", f"{rate} [{low}, {high}]"), *_format_fields(row, EVAL)]


def _format_fields(row: Row, fields: list[Field]) -> list[tuple[str, str]]:
    return [(label, form(read_learned(row, key))) for key, label, form in fields if key in row]


def _join_fields(fields: list[tuple[str, str]], bright: str = "") -> Text:
    text = Text()
    for label, value in fields:
        style = "bold cyan" if label == bright else "dim"
        text.append(f"{label} ", style=style).append(value).append("   ")
    return text


def _draw_header(train: list[Row], total_steps: int | None) -> Table:
    step = train[-1]["step"] if train else 0
    time_left = _estimate_time_left(train, total_steps)
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="bold")
    grid.add_column(ratio=1)
    grid.add_column(style="dim", justify="right")
    if total_steps:
        bar = ProgressBar(
            total=total_steps, completed=step, complete_style="green", finished_style="green"
        )
        grid.add_row(f"update {step} / {total_steps}", bar, time_left)
    else:
        grid.add_row(f"update {step}", "", time_left)
    return grid


def _estimate_time_left(train: list[Row], total_steps: int | None) -> str:
    times = [row.get("time/total") for row in train[-RECENT_UPDATES:]]
    recent = [time for time in times if time is not None]
    left = total_steps - train[-1]["step"] if total_steps and train else 0
    return f"eta {format_seconds(left * sum(recent) / len(recent))}" if recent and left > 0 else ""


def _draw_success(train: list[Row], evals: list[Row]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(style="bold green", justify="right", width=6)
    grid.add_column(style="green")
    grid.add_column(style="dim")
    if train:
        _add_rates(grid, "train success", [row.get("rollout/success") for row in train])
    if evals:
        low, high = (format_percent(evals[-1].get(f"eval/{name}")) for name in ("low", "high"))
        rates = [row.get("eval/success") for row in evals]
        _add_rates(grid, "eval success", rates, f"{low} – {high}")
    return grid


def _add_rates(grid: Table, label: str, rates: list[float | None], bounds: str = "") -> None:
    grid.add_row(label, format_percent(rates[-1]), draw_sparkline(rates, SPARKLINE_WIDTH), bounds)


def _draw_numbers(row: Row) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in PANEL_COLUMNS:
        grid.add_column(style="dim", min_width=9)
        grid.add_column(justify="right", min_width=8)
    for fields in zip(*PANEL_COLUMNS, strict=True):
        cells = ((label, form(read_learned(row, key))) for key, label, form in fields)
        grid.add_row(*(text for cell in cells for text in cell))
    return grid


def _draw_times(row: Row, stage: str) -> Text:
    """The last row's seconds by stage; the stage that runs now is bright."""
    times = [key for key in row if key.startswith("time/")]
    fields = [(key.removeprefix("time/"), format_seconds(row[key])) for key in times]
    return _join_fields(fields, bright=stage)
