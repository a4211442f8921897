"""Charts as SVG, each a figure that follows the pointer (page/viewer.js)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from hiper_fast.runs.formats import format_percent, format_seconds

LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # the margins around the lines, which hold the ticks
SMALL, WIDE = (340, 200), (1040, 320)  # width and height
HEIGHT_TICKS, SMALL_TICKS, WIDE_TICKS = 5, 4, 10  # about so many
INTERVAL_WIDTH = 200
UNSEEN_GAMES = "unseen games"

Format = Callable[[float | None], str]


class Series(NamedTuple):
    """A line: its label, its CSS class, y (None: a gap) for each x of the chart, and perhaps a band about it."""

    label: str
    kind: str
    values: list[float | None]
    bounds: Sequence[tuple[float, float] | None] = ()


class Point(NamedTuple):
    """A rate at a step, with its interval."""

    step: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """Where steps and values stand in the SVG."""

    size: tuple[int, int]
    steps: tuple[int, int]
    limits: tuple[float, float]

    def place_step(self, step: float) -> float:
        first, last = self.steps
        inner_width = self.size[0] - LEFT - RIGHT
        return round(LEFT + (step - first) / (last - first) * inner_width, 1)

    def place_value(self, value: float) -> float:
        low, high = self.limits
        height = self.size[1]
        inside = min(high, max(low, value))
        return round(height - BOTTOM - (inside - low) / (high - low) * (height - TOP - BOTTOM), 1)


def draw_chart(
    title: str,
    steps: Sequence[float],
    series: list[Series],
    form: Format,
    *,
    name_step: Callable[[float], str] = "step {}".format,
    size: tuple[int, int] = SMALL,
    limits: tuple[float, float] | None = None,
    points: Sequence[Point] = (),
    stacked: bool = False,
) -> str:
    """One figure: lines (or stacked areas) over steps, and points with their intervals.

    `name_step` says what the pointer calls an x.
    """
    tops = _stack(series) if stacked else [line.values for line in series]
    shown = [value for values in tops for value in values if value is not None]
    limits = limits or _choose_limits([*shown, 0.0] if stacked else shown)
    frame = Frame(size, (steps[0], max(steps[-1], steps[0] + 1)), limits)
    draw_series = _draw_areas if stacked else _draw_lines
    parts = [
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">',
        *_draw_ticks(frame, form),
        *_draw_bands(frame, steps, series),
        *draw_series(frame, steps, series, tops),
        *_draw_points(frame, points),
        f'<line class="cursor" y1="{TOP}" y2="{size[1] - BOTTOM}"/></svg>',
    ]
    hover = {
        "x": [frame.place_step(step) for step in steps],
        "text": _describe_steps(steps, series, form, points, name_step),
    }
    return (
        f'<figure class="chart" data-hover="{escape(json.dumps(hover))}">'
        f'<figcaption>{escape(title)}<span class="legend">{_draw_legend(series, points)}</span>'
        f"</figcaption>{''.join(parts)}</figure>"
    )


def draw_intervals(intervals: Sequence[tuple[str, float, float, float]]) -> str:
    """Bars on a 0..1 scale, one below the other: the CSS class, rate and bounds of each."""
    width = INTERVAL_WIDTH
    parts = [
        f'<svg class="interval" viewBox="0 0 {width} 20" preserveAspectRatio="none" role="img">'
    ]
    for index, (kind, rate, low, high) in enumerate(intervals):
        y = 10 if len(intervals) == 1 else 6 + 8 * index
        ends = f'x1="{width * low:.1f}" x2="{width * high:.1f}"'
        parts.append(f'<line class="{kind}" {ends} y1="{y}" y2="{y}"/>')
        corner = f'x="{width * rate - 1.5:.1f}" y="{y - 3.5}"'
        parts.append(f'<rect class="{kind}" {corner} width="3" height="7"/>')
    return "".join(parts) + "</svg>"


def choose_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    tolerance = 1e-9
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.ceil(low / step - tolerance), math.floor(high / step + tolerance)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _choose_limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - room), high + room


def _stack(series: list[Series]) -> list[list[float]]:
    tops, below = [], [0.0] * len(series[0].values)
    for line in series:
        below = [b + (v or 0.0) for b, v in zip(below, line.values, strict=True)]
        tops.append(below)
    return tops


def _draw_ticks(frame: Frame, form: Format) -> Iterable[str]:
    width, height = frame.size
    for tick in choose_ticks(*frame.limits, HEIGHT_TICKS):
        y = frame.place_value(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>'
        place = f'x="{LEFT - 6}" y="{y + 3.5:.1f}"'
        yield f'<text class="tick" {place} text-anchor="end">{_format_tick(tick, form)}</text>'
    for tick in choose_ticks(*frame.steps, WIDE_TICKS if frame.size == WIDE else SMALL_TICKS):
        if tick == int(tick):
            place = f'x="{frame.place_step(tick)}" y="{height - 7}"'
            yield f'<text class="tick" {place} text-anchor="middle">{int(tick)}</text>'


def _format_tick(value: float, form: Format) -> str:
    if form is format_percent:
        return f"{100 * value:.3g}%"
    return f"{value:g}s" if form is format_seconds else f"{value:g}"


def _draw_areas(
    frame: Frame, steps: Sequence[float], series: list[Series], tops: list[list[float]]
) -> Iterable[str]:
    edges = [_draw_edge(frame, steps, values) for values in ([0.0] * len(steps), *tops)]
    for line, floor, top in zip(series, edges, edges[1:], strict=False):
        yield f'<polygon class="{line.kind}" points="{" ".join([*top, *reversed(floor)])}"/>'


def _draw_edge(frame: Frame, steps: Sequence[float], values: Sequence[float]) -> list[str]:
    pairs = zip(steps, values, strict=True)
    return [f"{frame.place_step(step)},{frame.place_value(value)}" for step, value in pairs]


def _draw_bands(frame: Frame, steps: Sequence[float], series: list[Series]) -> Iterable[str]:
    for line in series:
        pairs = zip(steps, line.bounds, strict=bool(line.bounds))
        edges = [(step, *bounds) for step, bounds in pairs if bounds]
        if edges:
            where, lows, highs = zip(*edges, strict=True)
            low, high = _draw_edge(frame, where, lows), _draw_edge(frame, where, highs)
            yield f'<polygon class="band {line.kind}" points="{" ".join([*high, *reversed(low)])}"/>'


def _draw_lines(
    frame: Frame, steps: Sequence[float], series: list[Series], tops: list[list[float | None]]
) -> Iterable[str]:
    for line, values in zip(series, tops, strict=True):
        yield f'<path class="line {line.kind}" d="{_draw_path(frame, steps, values)}"/>'


def _draw_path(frame: Frame, steps: Sequence[float], values: list[float | None]) -> str:
    """Line commands; a gap lifts the pen, and a point between two gaps becomes a dot."""
    commands, drawing = [], False
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            place = f"{frame.place_step(step)} {frame.place_value(value)}"
            commands.append(f"L{place}" if drawing else f"M{place}h0")
        drawing = value is not None
    return "".join(commands)


def _draw_points(frame: Frame, points: Sequence[Point]) -> Iterable[str]:
    for point in points:
        x = frame.place_step(point.step)
        ends = f'y1="{frame.place_value(point.low)}" y2="{frame.place_value(point.high)}"'
        yield f'<line class="whisker" x1="{x}" x2="{x}" {ends}/>'
        yield f'<circle class="point" cx="{x}" cy="{frame.place_value(point.rate)}" r="4"/>'


def _draw_legend(series: list[Series], points: Sequence[Point]) -> str:
    labels = [(line.label, line.kind) for line in series]
    if points:
        labels.append((f"{UNSEEN_GAMES}, 95 % interval", "dot"))
    if len(labels) == 1:
        return ""
    return "".join(f'<span><i class="{kind}"></i>{escape(label)}</span>' for label, kind in labels)


def _describe_steps(
    steps: Sequence[float],
    series: list[Series],
    form: Format,
    points: Sequence[Point],
    name_step: Callable[[float], str],
) -> list[str]:
    """What the pointer tells at each step."""
    texts = {step: name_step(step) for step in steps}
    for index, step in enumerate(steps):
        shown = [line for line in series if line.values[index] is not None]
        texts[step] += "".join(f"\n{line.label} {_describe(line, index, form)}" for line in shown)
    for step, rate, low, high in points:
        texts[step] += f"\n{UNSEEN_GAMES} {form(rate)} [{form(low)}, {form(high)}]"
    return list(texts.values())


def _describe(line: Series, index: int, form: Format) -> str:
    value, bounds = form(line.values[index]), line.bounds and line.bounds[index]
    return f"{value} [{form(bounds[0])}, {form(bounds[1])}]" if bounds else value
