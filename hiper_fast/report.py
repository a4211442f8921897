"""A run as one self-contained page: `python -m hiper_fast.report runs/<name>` writes its `report.html`.

Curves and tables are drawn here, as HTML and SVG; the episode viewer gets its data as JSON and is drawn by
`report_page/viewer.js`. Nothing is loaded from elsewhere, and no text of a run is ever taken for markup.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from hiper_fast import response
from hiper_fast.metrics import decimal, percent, read_metrics, seconds, wilson

PAGE = Path(__file__).parent / "report_page"
SHOWN_STEPS = 24  # steps whose episodes the viewer holds, spread evenly over the run
SHOWN_EPISODES = 12  # per step and stage

Row = dict[str, Any]


def build(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from config.yaml, metrics.jsonl and episodes/ (any may be absent)."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder at {run_dir}; give a folder like runs/<name>")
    rows = read_metrics(run_dir / "metrics.jsonl")
    config_file = run_dir / "config.yaml"
    config = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    viewer, note = _episodes(run_dir / "episodes")
    page = Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        name=escape(run_dir.resolve().name),
        summary=escape(_summary(config)),
        config=escape(config or "no config.yaml"),
        figures=_figures(rows),
        success=_success_chart(_stage(rows, "train"), evaluations(rows)),
        tasks=_task_table(evaluations(rows)),
        charts=_charts(rows),
        note=escape(note),
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=(PAGE / "viewer.js").read_text(encoding="utf-8"),
        data=_script_json(viewer),
    )
    target, temporary = run_dir / "report.html", run_dir / ".report.html.tmp"
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


# The run's rows.


def _stage(rows: Iterable[Row], stage: str) -> list[Row]:
    """The stage's rows by step; of several with one step, the last."""
    return sorted({row["step"]: row for row in rows if row["stage"] == stage}.values(), key=lambda row: row["step"])


def evaluations(rows: Iterable[Row]) -> list[Row]:
    """Evaluation rows that have a success rate, each with its interval."""
    evals = []
    for row in _stage(rows, "eval"):
        rate = _finite(row.get("eval/success"))
        if rate is None:
            continue
        low, high = _finite(row.get("eval/low")), _finite(row.get("eval/high"))
        if low is None or high is None:
            low, high = _interval(rate, row.get("eval/episodes"))
        evals.append({**row, "eval/low": low, "eval/high": high})
    return evals


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _interval(rate: float, episodes: Any) -> tuple[float, float]:
    n = int(_finite(episodes) or 0)
    return wilson(round(min(1.0, max(0.0, rate)) * n), n)


def _summary(config: str) -> str:
    """One line that says what ran: environment, model, estimator, seed, size."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        tree = None

    def value(path: str) -> Any:
        node = tree
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    parts = [
        (value("env.name"), "{}"),
        (value("env.size") if value("env.name") == "household" else value("env.eval_split"), "{}"),
        (value("model.path"), "model {}"),
        (value("advantage.estimator"), "{}"),
        (value("train.episodes"), "{} episodes per update"),
        (value("train.lr"), "lr {}"),
        (value("run.seed"), "seed {}"),
    ]
    return "  ·  ".join(form.format(content) for content, form in parts if content is not None)


def _figures(rows: list[Row]) -> str:
    train, evals = _stage(rows, "train"), evaluations(rows)
    cards = []

    def card(label: str, figure: str, note: str = "", kind: str = "") -> None:
        cards.append(
            f'<div class="figure {kind}"><span class="label">{escape(label)}</span>'
            f'<span class="value">{escape(figure)}</span><span class="note">{escape(note)}</span></div>'
        )

    def bounds(row: Row) -> str:
        return f"{percent(row['eval/low'])} – {percent(row['eval/high'])}, 95 %"

    if evals:
        first, last = evals[0], evals[-1]
        card(
            "Warm start" if first["step"] == 0 else f"Update {first['step']}",
            percent(first["eval/success"]),
            bounds(first),
        )
        if len(evals) > 1:
            gain = 100 * (last["eval/success"] - first["eval/success"])
            card(f"Update {last['step']}", percent(last["eval/success"]), bounds(last), "main")
            card("Change", f"{gain:+.1f}", "points on unseen games")
    elif train:
        card("Success in training", percent(_finite(train[-1].get("rollout/success"))), "no evaluation yet")
    if train:
        episodes = _finite(train[-1].get("episodes"))
        card("Updates", f"{train[-1]['step']:,}", f"{int(episodes):,} episodes" if episodes else "")
    # The warm start's rows count from its beginning, so its last one is its length.
    warm = _total(rows, "warm_start", "time/demonstrations") + _total(_stage(rows, "warm_start")[-1:], "warm_start")
    trained, evaluated = _total(rows, "train"), _total(rows, "eval", "time/eval")
    if warm + trained + evaluated:
        card(
            "Time",
            seconds(warm + trained + evaluated),
            f"{seconds(warm)} warm start, {seconds(evaluated)} eval",
        )
    return "".join(cards) or '<p class="empty">Nothing has been logged yet.</p>'


def _total(rows: Iterable[Row], stage: str, key: str = "time/total") -> float:
    return sum(_finite(row.get(key)) or 0.0 for row in rows if row["stage"] == stage)


def _task_table(evals: list[Row]) -> str:
    if not evals:
        return '<p class="empty">No evaluation yet.</p>'
    ends = [evals[0], evals[-1]] if len(evals) > 1 else [evals[0]]
    prefix = "eval/success/"
    types = sorted({key.removeprefix(prefix) for row in ends for key in row if key.startswith(prefix)})
    header = "".join(
        f'<th colspan="2">{"Warm start" if not row["step"] else "Update " + str(row["step"])}</th>' for row in ends
    )
    lines = []
    for name in [*types, None]:
        cells, intervals = [], []
        for row in ends:
            suffix = "" if name is None else f"/{name}"
            rate, n = _finite(row.get(f"eval/success{suffix}")), _finite(row.get(f"eval/episodes{suffix}"))
            if rate is None:
                cells.append('<td class="number">–</td><td></td>')
                continue
            low, high = _interval(rate, n) if name else (row["eval/low"], row["eval/high"])
            intervals.append((rate, low, high, row is ends[-1]))
            games = f"{int(n)} games" if n else ""
            cells.append(
                f'<td class="number">{percent(rate)}</td>'
                f'<td class="bounds">{100 * low:.0f} – {100 * high:.0f}<span>{games}</span></td>'
            )
        label = "All" if name is None else name.replace("_", " ")
        kind = ' class="all"' if name is None else ""
        lines.append(f"<tr{kind}><td>{escape(label)}</td>{''.join(cells)}<td>{_interval_svg(intervals)}</td></tr>")
    return (
        f'<table><thead><tr><th>Task</th>{header}<th class="axis"><span>0</span>'
        "<span>success, 95 % interval</span><span>100 %</span></th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _interval_svg(intervals: Sequence[tuple[float, float, float, bool]]) -> str:
    """Interval bars on a 0..1 scale, the first evaluation above the last."""
    parts = ['<svg class="interval" viewBox="0 0 200 20" preserveAspectRatio="none" role="img">']
    for index, (rate, low, high, last) in enumerate(intervals):
        y = 10 if len(intervals) == 1 else 6 + 8 * index
        kind = "last" if last else "first"
        parts.append(f'<line class="{kind}" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<rect class="{kind}" x="{200 * rate - 1.5:.1f}" y="{y - 3.5}" width="3" height="7"/>')
    return "".join(parts) + "</svg>"


# Charts.


class Series(NamedTuple):
    """A line: its label, its CSS class, and y (None: a gap) for each x of the chart."""

    label: str
    kind: str
    values: list[float | None]


def _success_chart(train: list[Row], evals: list[Row]) -> str:
    steps = sorted({row["step"] for row in [*train, *evals]})
    if not steps:
        return '<p class="empty">No update yet.</p>'
    raw = _column(train, "rollout/success", steps)
    window = max(5, len(train) // 20)
    series = [
        Series("training", "faint", raw),
        Series(f"training, mean of {window}", "a", _smooth(raw, window)),
    ]
    points = [(row["step"], row["eval/success"], row["eval/low"], row["eval/high"]) for row in evals]
    return _chart("Success rate", steps, series, percent, size=(1040, 320), limits=(0.0, 1.0), points=points)


def _charts(rows: list[Row]) -> str:
    warm, train, evals = _stage(rows, "warm_start"), _stage(rows, "train"), _stage(rows, "eval")
    plans: list[tuple[str, list[Row], list[tuple[str, str]], Callable]] = [
        ("Segment length, turns", train, [("rollout/segment_length", "segment length")], decimal),
        ("Switch rate", train, [("rollout/switch_rate", "switch rate")], percent),
        ("Valid rate", train, [("rollout/valid_rate", "valid rate")], percent),
        ("Turns per episode", train, [("rollout/turns", "turns")], decimal),
        ("Reward per episode", train, [("rollout/reward", "reward")], decimal),
        ("KL to the reference policy", train, [("loss/kl", "KL")], decimal),
        ("Policy loss", train, [("loss/policy", "policy loss")], decimal),
        ("Value loss", train, [("loss/value", "value loss")], decimal),
        ("Entropy", train, [("loss/entropy", "entropy")], decimal),
        ("Clip fraction", train, [("loss/clip_fraction", "clip fraction")], percent),
        ("Gradient norm", train, [("optim/grad_norm", "gradient norm")], decimal),
        ("Turns per episode, evaluation", evals, [("eval/turns", "turns")], decimal),
        ("Warm start: imitation loss", warm, [("loss/imitation", "imitation loss")], decimal),
        ("Warm start: accuracy", warm, [("warm_start/accuracy", "accuracy")], percent),
    ]
    charts = []
    for title, source, columns, form in plans:
        steps = [row["step"] for row in source]
        series = [Series(label, "a", _column(source, key, steps)) for key, label in columns]
        if any(v is not None for line in series for v in line.values):
            charts.append(_chart(title, steps, series, form))
    charts.append(_time_chart(train))
    return "".join(charts) or '<p class="empty">No update yet.</p>'


def _time_chart(train: list[Row]) -> str:
    """Seconds per update, its stages stacked."""
    names = list(dict.fromkeys(k for row in train for k in row if k.startswith("time/") and k != "time/total"))
    if not names:
        return ""
    steps = [row["step"] for row in train]
    series = [
        Series(name.removeprefix("time/"), f"area s{i % 5}", [v or 0.0 for v in _column(train, name, steps)])
        for i, name in enumerate(names)
    ]
    return _chart("Time per update", steps, series, seconds, stacked=True)


def _column(rows: list[Row], key: str, steps: list[int]) -> list[float | None]:
    by_step = {row["step"]: _finite(row.get(key)) for row in rows}
    return [by_step.get(step) for step in steps]


def _smooth(values: list[float | None], window: int) -> list[float | None]:
    """The mean of the last `window` values that are there."""
    smooth, recent = [], []
    for value in values:
        if value is not None:
            recent = [*recent, value][-window:]
        smooth.append(sum(recent) / len(recent) if recent and value is not None else None)
    return smooth


def _chart(
    title: str,
    steps: list[int],
    series: list[Series],
    form: Callable[[float | None], str],
    *,
    size: tuple[int, int] = (340, 200),
    limits: tuple[float, float] | None = None,
    points: Sequence[tuple[int, float, float, float]] = (),
    stacked: bool = False,
) -> str:
    """One figure with an SVG: lines (or stacked areas) over steps, and points with interval bars."""
    width, height = size
    left, right, top, bottom = 46, 10, 10, 24
    tops = _stack(series) if stacked else [line.values for line in series]
    shown = [v for values in tops for v in values if v is not None]
    low, high = limits or _limits([*shown, 0.0] if stacked else shown)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return round(left + (step - first) / (last - first) * (width - left - right), 1)

    def y(value: float) -> float:
        inside = min(high, max(low, value))
        return round(height - bottom - (inside - low) / (high - low) * (height - top - bottom), 1)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{_tick(tick, form)}</text>'
        )
    for tick in ticks(first, last, 10 if width > 600 else 4):
        if tick == int(tick):
            parts.append(f'<text class="tick" x="{x(tick)}" y="{height - 7}" text-anchor="middle">{int(tick)}</text>')
    floor = [0.0] * len(steps)
    for line, upper in zip(series, tops, strict=True):
        if stacked:
            forth = [f"{x(s)},{y(v)}" for s, v in zip(steps, upper, strict=True)]
            back = [f"{x(s)},{y(v)}" for s, v in zip(steps, floor, strict=True)]
            parts.append(f'<polygon class="{line.kind}" points="{" ".join([*forth, *reversed(back)])}"/>')
            floor = upper
        else:
            parts.append(f'<path class="line {line.kind}" d="{_path(steps, upper, x, y)}"/>')
    for step, rate, lower, upper in points:
        parts.append(f'<line class="whisker" x1="{x(step)}" x2="{x(step)}" y1="{y(lower)}" y2="{y(upper)}"/>')
        parts.append(f'<circle class="point" cx="{x(step)}" cy="{y(rate)}" r="4"/>')
    parts.append(f'<line class="cursor" y1="{top}" y2="{height - bottom}"/></svg>')

    hover = {"x": [x(step) for step in steps], "text": _hover(steps, series, form, points)}
    labels = [(line.label, line.kind) for line in series] + ([("unseen games, 95 % interval", "dot")] if points else [])
    legend = (
        ""
        if len(labels) == 1
        else "".join(f'<span><i class="{kind}"></i>{escape(label)}</span>' for label, kind in labels)
    )
    return (
        f'<figure class="chart" data-hover="{escape(json.dumps(hover))}"><figcaption>{escape(title)}'
        f'<span class="legend">{legend}</span></figcaption>{"".join(parts)}</figure>'
    )


def _path(steps: list[int], values: list[float | None], x: Callable, y: Callable) -> str:
    """Line commands; a gap lifts the pen, and a point between two gaps becomes a dot."""
    commands, pen = [], False
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            commands.append(f"L{x(step)} {y(value)}" if pen else f"M{x(step)} {y(value)}h0")
        pen = value is not None
    return "".join(commands)


def _stack(series: list[Series]) -> list[list[float]]:
    tops, below = [], [0.0] * len(series[0].values)
    for line in series:
        below = [b + (v or 0.0) for b, v in zip(below, line.values, strict=True)]
        tops.append(below)
    return tops


def _hover(steps: list[int], series: list[Series], form: Callable, points: Sequence) -> list[str]:
    at = {step: f"\nunseen games {form(rate)} [{form(low)}, {form(high)}]" for step, rate, low, high in points}
    return [
        f"step {step}"
        + "".join(f"\n{line.label} {form(line.values[i])}" for line in series if line.values[i] is not None)
        + at.get(step, "")
        for i, step in enumerate(steps)
    ]


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - room), high + room


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float, form: Callable) -> str:
    return f"{100 * value:.3g}%" if form is percent else f"{value:g}s" if form is seconds else f"{value:g}"


# Episodes.


def _episodes(folder: Path) -> tuple[list[dict], str]:
    """What the viewer shows, one entry per step and stage, and a line on what was left out."""
    files = sorted(folder.glob("step-*.jsonl")) if folder.is_dir() else []
    if len(files) > SHOWN_STEPS:
        files = [files[round(i * (len(files) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    groups: dict[tuple[int, str], list[dict]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                episode = json.loads(line)
                groups.setdefault((int(episode["step"]), str(episode["stage"])), []).append(episode)
            except (ValueError, KeyError, TypeError):
                continue  # a half-written line
    kept = {key: episodes[:SHOWN_EPISODES] for key, episodes in groups.items()}
    entries = [
        {
            "step": step,
            "stage": stage,
            "scale": _scale(episodes),
            "episodes": [_episode(episode) for episode in episodes],
        }
        for (step, stage), episodes in sorted(kept.items())
    ]
    shown, recorded = sum(map(len, kept.values())), sum(map(len, groups.values()))
    note = f"{shown} of {recorded} episodes are shown; all that were recorded are in episodes/." if kept else ""
    return entries, note


def _episode(episode: dict) -> dict:
    return {
        "task": str(episode.get("task", "")),
        "type": str(episode.get("task_type", "")).replace("_", " "),
        "won": bool(episode.get("won")),
        "truncated": bool(episode.get("truncated")),
        "turns": [
            {
                "observation": str(turn.get("observation", "")),
                "blocks": blocks(str(turn.get("response", ""))),
                "switch": bool(turn.get("switch")) or index == 0,
                "valid": bool(turn.get("valid")),
                "subgoal": turn.get("subgoal"),
                "reward": _rounded(turn.get("reward")),
                "advantage": {level: _rounded(turn.get(f"advantage_{name}")) for level, name in LEVELS.items()},
                "value": {level: _rounded(turn.get(f"value_{name}")) for level, name in LEVELS.items()},
            }
            for index, turn in enumerate(episode.get("turns", []))
        ],
    }


LEVELS = {"switch": "switch", "subgoal": "high", "action": "low"}


def blocks(text: str) -> list[tuple[str, str]]:
    """Cut a response into (text, block) pieces, block in {"switch", "subgoal", "action", ""}.

    Without an action block the rest of the response trains as the action, and is named so.
    """
    parsed, data = response.parse(text), text.encode("utf-8", "surrogatepass")
    spans = {"switch": parsed.switch_span, "subgoal": parsed.subgoal_span, "action": parsed.action_span}
    present = {name: span for name, span in spans.items() if span}
    cuts = sorted({0, len(data), *(end for span in present.values() for end in span)})
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        inside = [name for name, span in present.items() if span[0] <= start and end <= span[1]]
        name = inside[-1] if inside else "" if parsed.action_span else "action"
        pieces.append((data[start:end].decode("utf-8", "replace"), name))
    return pieces


def _scale(episodes: list[dict]) -> float | None:
    """The advantage shown in full colour: the 95th percentile of all |advantage|, None without any."""
    found = sorted(
        abs(value)
        for episode in episodes
        for turn in episode.get("turns", [])
        for name in LEVELS.values()
        if (value := _finite(turn.get(f"advantage_{name}"))) is not None
    )
    return max(_rounded(found[int(0.95 * (len(found) - 1))]), 1e-4) if found else None


def _rounded(value: Any) -> float | None:
    value = _finite(value)
    return None if value is None else round(value, 4)


def _script_json(value: Any) -> str:
    """JSON that may stand inside <script>: no character of it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hiper_fast.report", description="Write a run's report.html.")
    parser.add_argument("run", type=Path, help="the run folder, like runs/<name>")
    try:
        print(build(parser.parse_args(argv).run))
    except OSError as error:
        print(f"python -m hiper_fast.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
