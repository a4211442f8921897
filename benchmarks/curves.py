"""Success on unseen games against wall time and updates, one line per run, as an SVG for a light or a dark page.

python benchmarks/curves.py runs/seed0 runs/seed1 runs/seed2 --out docs/success.svg

Wall time is what metrics.jsonl records: demonstrations, imitation, updates and evaluations, each point after its own
evaluation. Start-up, checkpoints and reports are not timed there, and so not in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from hiper_fast.runs.charts import choose_ticks
from hiper_fast.runs.metrics import add_minutes, read_metrics
from hiper_fast.runs.report import select_evaluations

WIDTH, HEIGHT, TOP, BOTTOM = 960, 400, 86, 44
LIGHT = ["#0f766e", "#c2410c", "#2563eb", "#9333ea", "#be185d", "#4d7c0f"]
DARK = ["#2dd4bf", "#fb923c", "#60a5fa", "#c084fc", "#f472b6", "#a3e635"]
STYLE = """
  svg { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; --page: #ffffff;
    --text: #1f2328; --dim: #59636e; --rule: #d8dee4; %s }
  @media (prefers-color-scheme: dark) {
    svg { --page: #14171b; --text: #e6edf3; --dim: #9aa4af; --rule: #2f363e; %s } }
  text { fill: var(--dim); font-variant-numeric: tabular-nums } .title { fill: var(--text); font-size: 16px; font-weight: 600 }
  .card { fill: var(--page); stroke: var(--rule) } .grid { stroke: var(--rule) }
  .value { font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round }
  .band { stroke: none; opacity: .14 } .line { fill: none; stroke-width: 2; stroke-linejoin: round }
  .point { stroke: var(--page); stroke-width: 1.5 }
"""  # noqa: E501


class Point(NamedTuple):
    """One evaluation."""

    minutes: float  # wall time since the run's start
    update: int
    rate: float
    low: float
    high: float


class Run(NamedTuple):
    label: str
    warm_started: bool
    points: list[Point]


class CurveError(ValueError):
    """A run that cannot be drawn; the message names it."""


def read_run(path: Path, label: str | None = None) -> Run:
    """A run folder or its metrics.jsonl."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise CurveError(
            f"{path}: there is no metrics.jsonl; give a run's folder or its metrics file"
        )
    logged = read_metrics(file)
    rows = select_evaluations(add_minutes(logged))
    if not rows:
        raise CurveError(f"{path}: no evaluation in its metrics yet")
    points = [
        Point(
            row["minutes"], row["step"], *(row[f"eval/{key}"] for key in ("success", "low", "high"))
        )
        for row in rows
    ]
    warm_started = points[0].update == 0 and any(row["stage"] == "warm_start" for row in logged)
    return Run(label or file.resolve().parent.name, warm_started, points)


def draw(runs: Sequence[Run]) -> str:
    """The figure as SVG."""
    highest = max(point.high for run in runs for point in run.points)
    ceiling = min(1.0, max(0.1, math.ceil(10 * highest) / 10))

    def y(rate: float) -> float:
        return round(HEIGHT - BOTTOM - rate / ceiling * (HEIGHT - TOP - BOTTOM), 1)

    def palette(colours: list[str]) -> str:
        return " ".join(f"--run{i}: {colour};" for i, colour in enumerate(colours[: len(runs)]))

    title = "Success on unseen games"
    start = "after the warm start" if all(run.warm_started for run in runs) else "at the start"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" aria-label="{title}">',
            f"<style>{STYLE % (palette(LIGHT), palette(DARK))}</style>",
            f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
            f'<text class="title" x="20" y="30">{title}</text>',
            f'<text x="{WIDTH - 20}" y="30" text-anchor="end">{start} → at the end; bands: Wilson 95 %</text>',
            *legend(runs),
            *panel(runs, "minutes", "minutes of wall time", (56, 560), ceiling, y, labelled=True),
            *panel(runs, "update", "updates", (620, WIDTH - 24), ceiling, y),
            "</svg>\n",
        ]
    )


def legend(runs: Sequence[Run]) -> list[str]:
    column = min(280.0, (WIDTH - 40) / len(runs))
    parts = []
    for i, run in enumerate(runs):
        x = 20 + i * column
        ends = " → ".join(
            f"{100 * point.rate:.1f} %" for point in dict.fromkeys((run.points[0], run.points[-1]))
        )
        parts.append(
            f'<line class="line" style="stroke: var(--run{i})" x1="{x:g}" x2="{x + 16:g}" y1="52" y2="52"/>'
        )
        parts.append(f'<text x="{x + 22:g}" y="56">{escape(run.label)}: {ends}</text>')
    return parts


def panel(
    runs: Sequence[Run],
    field: str,
    title: str,
    span: tuple[int, int],
    ceiling: float,
    y: Callable[[float], float],
    *,
    labelled: bool = False,
) -> list[str]:
    """Grid, bands, lines and points of all runs over one field of their points."""
    left, right = span
    last = max([getattr(point, field) for run in runs for point in run.points] + [1e-9])
    room = 48 if labelled else 0  # for the values beside the first and last points

    def x(point: Point) -> float:
        return place(getattr(point, field))

    def place(value: float) -> float:
        return round(left + room + value / last * (right - left - 2 * room), 1)

    parts = []
    for tick in choose_ticks(0, ceiling, 5):
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>'
        )
    for tick in choose_ticks(0, last, 6):
        parts.append(
            f'<text x="{place(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{(left + right) / 2:g}" y="{HEIGHT - 8}" text-anchor="middle">{title}</text>'
    )
    for i, run in enumerate(runs):
        forth = [f"{x(p)},{y(p.high)}" for p in run.points]
        back = [f"{x(p)},{y(p.low)}" for p in reversed(run.points)]
        parts.append(
            f'<polygon class="band" style="fill: var(--run{i})" points="{" ".join(forth + back)}"/>'
        )
    for i, run in enumerate(runs):
        line = " ".join(f"{x(p)},{y(p.rate)}" for p in run.points)
        parts.append(f'<polyline class="line" style="stroke: var(--run{i})" points="{line}"/>')
        parts += [
            f'<circle class="point" style="fill: var(--run{i})" cx="{x(p)}" cy="{y(p.rate)}" r="4"/>'
            for p in run.points
        ]
    if labelled:
        parts += values([(i, run.points[0]) for i, run in enumerate(runs)], x, y, -8, "end")
        parts += values(
            [(i, run.points[-1]) for i, run in enumerate(runs) if len(run.points) > 1],
            x,
            y,
            8,
            "start",
        )
    return parts


def values(
    ends: list[tuple[int, Point]],
    x: Callable[[Point], float],
    y: Callable[[float], float],
    offset: int,
    anchor: str,
) -> list[str]:
    """Success in per cent beside each point, in its run's colour; moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: -end[1].rate)
    heights = apart([y(point.rate) + 4 for _, point in ends], 14, HEIGHT - BOTTOM)
    return [
        f'<text class="value" style="fill: var(--run{i})" x="{x(point) + offset:.1f}" y="{height:.1f}" '
        f'text-anchor="{anchor}">{100 * point.rate:.0f} %</text>'
        for (i, point), height in zip(ends, heights, strict=True)
    ]


def apart(heights: list[float], gap: float, bottom: float) -> list[float]:
    """Rising heights moved down until they keep a gap, then up again where they passed the bottom."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = bottom
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    return heights


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or metrics.jsonl files"
    )
    parser.add_argument(
        "--labels", metavar="A,B", help="names for the legend, in order [the folders' names]"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the SVG file to write"
    )
    arguments = parser.parse_args(argv)
    labels = arguments.labels.split(",") if arguments.labels else [None] * len(arguments.runs)
    if len(labels) != len(arguments.runs):
        parser.error(f"--labels: {len(labels)} names for {len(arguments.runs)} runs")
    if len(arguments.runs) > len(LIGHT):
        parser.error(f"at most {len(LIGHT)} runs fit in one figure, got {len(arguments.runs)}")
    try:
        figure = draw(
            [read_run(path, label) for path, label in zip(arguments.runs, labels, strict=True)]
        )
        arguments.out.write_text(figure, encoding="utf-8")
    except CurveError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.exit(
            2, f"{parser.prog}: --out {arguments.out}: cannot be written ({error.strerror})\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
