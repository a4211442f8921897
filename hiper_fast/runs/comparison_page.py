"""A comparison's results for people: `report.html`, one self-contained page, and `results.md`, the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from hiper_fast.runs.charts import WIDE, Series, draw_chart
from hiper_fast.runs.folder import replace_text
from hiper_fast.runs.formats import NOTHING, format_percent, format_seconds, format_whole
from hiper_fast.runs.report import PAGE

COLOURS = 8  # arms with a colour of their own (page/comparison.css)
MINUS, DASH = "−", "–"
AXIS_TITLES = {
    "turns": "Success over turns played in training",
    "updates": "Success over updates",
    "minutes": "Success over minutes of wall time",
}
X_NAMES = {"turns": "{:,.0f} turns", "updates": "update {}", "minutes": "{:.1f} min"}

Results = dict[str, Any]
Figure = dict[str, float | None]


class Table(NamedTuple):
    title: str
    lead: str
    header: list[str]
    rows: list[list[str]]


def write_page(results: Results, folder: Path) -> Path:
    """Writes `folder/report.html` and `folder/results.md`; returns the page."""
    tables = build_tables(results)
    page = Template((PAGE / "comparison.html").read_text(encoding="utf-8")).substitute(
        name=escape(results["study"]),
        summary=escape(summarise(results)),
        findings="".join(f"<li>{escape(line)}</li>" for line in tell_findings(results)),
        curves=draw_curves(results),
        tables="".join(map(draw_table, tables)),
        method="".join(f"<li>{escape(line)}</li>" for line in tell_method(results)),
        differing=write_options(list_differing(results)),
        options=write_options(results["options"]),
        style="".join((PAGE / name).read_text() for name in ("style.css", "comparison.css")),
        script=(PAGE / "viewer.js").read_text(encoding="utf-8"),
    )
    replace_text(folder / "results.md", write_markdown(results, tables))
    return replace_text(folder / "report.html", page)


def write_options(options: dict[str, dict[str, Any]]) -> str:
    return escape(yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def summarise(results: Results) -> str:
    parts = [
        f"{len(results['arms'])} arms",
        "seeds " + ", ".join(map(str, results["seeds"])),
        *(f"{name} {value}" for name, value in list_shared(results).items()),
    ]
    return "  ·  ".join(parts)


def list_shared(results: Results) -> dict[str, Any]:
    """What ran, as far as it is the same for all arms."""
    names = "env.name", "model.path", "train.updates", "train.episodes", "eval.panel"
    arms = list(results["options"].values())
    return {
        name: arms[0][name]
        for name in names
        if name in arms[0] and all(arm.get(name) == arms[0][name] for arm in arms)
    }


def list_differing(results: Results) -> dict[str, dict[str, Any]]:
    """Arm -> those of its options in which arms differ."""
    arms = results["options"]
    first = next(iter(arms.values()))
    differing = [
        name for name in first if any(arm.get(name) != first[name] for arm in arms.values())
    ]
    return {arm: {name: own.get(name) for name in differing} for arm, own in arms.items()}


def name_measure(results: Results) -> str:
    return {
        "equal": f"success at {results['turns']:,} turns",
        "last": "success at the last evaluation",
        "tail": f"mean success of the last {results['tail']} evaluations",
    }[results["measure"]]


def tell_findings(results: Results) -> list[str]:
    """A sentence an arm: what the data tell of it against the reference, and how much they could tell."""
    lines = []
    for name, arm in results["arms"].items():
        against = arm.get("against")
        if name == results["reference"]:
            continue
        if against is None:
            lines.append(f"{name}: no seed in common with {results['reference']}.")
            continue
        gap = format_points(against["difference"])
        line = f"{name} against {results['reference']}: {gap} points, {against['verdict']}."
        least = against["least_visible"]
        if least is None:
            lines.append(f"{line} These seeds give no interval, so they can tell no gap.")
        else:
            lines.append(f"{line} Gaps of less than about {100 * least:.1f} points would not show.")
    if results["unfinished"]:
        lines.append(f"Unfinished, and so left out: {'; '.join(results['unfinished'])}.")
    return lines


def build_tables(results: Results) -> list[Table]:
    tables = [table_success(results), table_differences(results), table_types(results)]
    return [table for table in tables if table.rows]


def table_success(results: Results) -> Table:
    """Each arm's figures over its seeds."""
    threshold, turns = format_percent(results["threshold"]), f"{results['turns']:,} turns"
    header = ["Arm", "Seeds", "Start", "Last", f"Last {results['tail']}", f"At {turns}", "IQM"]
    header += [f"Turns to {threshold}", "Turns in all", "Wall time"]
    rows = []
    for name, arm in results["arms"].items():
        figures = (format_rate(arm[key]) for key in ("start", "last", "tail", "equal", "iqm"))
        took = [format_reach(arm["turns_to_threshold"]), format_whole(mean(arm["turns"]))]
        seconds = format_seconds(60 * mean(arm["minutes"]))
        rows.append([name, str(len(arm["seeds"])), *figures, *took, seconds])
    lead = (
        "Success on the panel, mean over seeds with its 95 % interval. IQM: interquartile mean of "
        f"the {name_measure(results)}, its interval over seeds and games. Turns to {threshold}: median over seeds. "
        "Turns and wall time are means; neither has the warm start's."
    )
    return Table("Success", lead, header, rows)


def table_differences(results: Results) -> Table:
    reference = results["reference"]
    header = ["Arm", "Difference, points", "By seed", "P(improvement)", f"Against {reference}"]
    rows = [
        [
            name,
            format_points(against["difference"]),
            " ".join(format_point(gap) for gap in against["each"]),
            format_rate(against["improvement"]),
            against["verdict"],
        ]
        for name, arm in results["arms"].items()
        if (against := arm.get("against"))
    ]
    lead = (
        f"{name_measure(results).capitalize()} less that of {reference} with the same seed, which began from the "
        "same warm start if its prompts are alike; Student's 95 % interval over seeds. An arm is called better or "
        f"worse only if the interval leaves out 0. {warn_of_many(len(rows))}P(improvement): share of pairs of seeds "
        "in which the arm does better."
    )
    return Table(f"Against {reference}", lead, header, rows)


def warn_of_many(arms: int) -> str:
    if arms < 2:
        return ""
    return f"Of {arms} such intervals each errs once in 20 times. "


def table_types(results: Results) -> Table:
    games = results["games"]
    header = ["Arm", *(f"{name.replace('_', ' ')} ({count})" for name, count in games.items())]
    rows = [
        [name, *(format_rate(arm["types"][kind]) for kind in games)]
        for name, arm in results["arms"].items()
    ]
    return Table(
        "By task type",
        f"{name_measure(results).capitalize()}; in brackets how many games there are.",
        header,
        rows,
    )


def tell_method(results: Results) -> list[str]:
    return [
        f"Equal turns: {results['turns']:,} turns of training are the most that every run reached. Where no "
        "evaluation stands there, each game's outcome is interpolated between the evaluations beside it.",
        "Last: each run's last evaluation, whatever its turns. "
        f"Last {results['tail']}: the mean of so many last evaluations, or of all after the start where there are "
        "fewer. The best is never picked.",
        "Curves: mean over seeds, linear between evaluations, as far as all seeds of an arm go; bands are Student's "
        "95 % intervals at each point. Wall time is that of runs side by side.",
        "Interval of IQM and P(improvement): percentile bootstrap, 2,000 draws of seeds and, within task types, "
        "of games; both arms of a pair get the same ones.",
        "Panel: " + ", ".join(f"{key} {value}" for key, value in results["panel"].items()) + ".",
        "Made with "
        + ", ".join(f"{key} {value}" for key, value in results["made_with"].items())
        + ".",
    ]


def draw_curves(results: Results) -> str:
    figures = []
    for axis, title in AXIS_TITLES.items():
        curves = {name: arm["curves"][axis] for name, arm in results["arms"].items()}
        x = [point["x"] for point in next(iter(curves.values()))]
        series = [
            draw_series(name, index, points) for index, (name, points) in enumerate(curves.items())
        ]
        options = {"limits": choose_limits(curves.values()), "size": WIDE}
        figures.append(
            draw_chart(title, x, series, format_percent, name_step=X_NAMES[axis].format, **options)
        )
    return "".join(figures)


def draw_series(name: str, index: int, points: Sequence[Figure]) -> Series:
    values = [point.get("value") for point in points]
    bounds = [
        (clip(point["low"]), clip(point["high"])) if point.get("low") is not None else None
        for point in points
    ]
    return Series(name, f"arm{index % COLOURS}", values, bounds)


def choose_limits(curves: Sequence[Sequence[Figure]]) -> tuple[float, float]:
    """From 0 to what the highest band reaches, in tenths."""
    tops = [point.get("high") or point.get("value") or 0.0 for points in curves for point in points]
    return 0.0, min(1.0, (int(10 * clip(max(tops))) + 1) / 10)


def draw_table(table: Table) -> str:
    header = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in table.rows
    )
    return (
        f'<section><h2>{escape(table.title)}</h2><p class="lead">{escape(table.lead)}</p>'
        f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def write_markdown(results: Results, tables: Sequence[Table]) -> str:
    parts = [f"# {results['study']}", summarise(results)]
    parts.append("\n".join(f"- {line}" for line in tell_findings(results)))
    for table in tables:
        lines = [table.header, ["--"] + ["--:"] * (len(table.header) - 1), *table.rows]
        cells = ([text.replace("|", "\\|") for text in line] for line in lines)
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in cells)]
        parts.append(table.lead)
    parts += ["## How it was made", "\n".join(f"- {line}" for line in tell_method(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def clip(rate: float) -> float:
    return min(1.0, max(0.0, rate))


def format_rate(figure: Figure) -> str:
    """72.3 % (68.1 – 76.5)."""
    rate = f"{100 * figure['value']:.1f} %"
    if figure["low"] is None:
        return rate
    low, high = (100 * clip(figure[bound]) for bound in ("low", "high"))
    return f"{rate} ({low:.1f} {DASH} {high:.1f})"


def format_points(figure: Figure) -> str:
    """+3.1 (−0.8 to +7.0)."""
    if figure["low"] is None:
        return format_point(figure["value"])
    low, high = (format_point(figure[bound]) for bound in ("low", "high"))
    return f"{format_point(figure['value'])} ({low} to {high})"


def format_point(gap: float) -> str:
    return f"{100 * gap:+.1f}".replace("-", MINUS)


def format_reach(reach: dict[str, Any]) -> str:
    """The median of turns, and how many seeds got there."""
    each = reach["each"]
    reached = sum(at is not None for at in each)
    turns = NOTHING if reach["median"] is None else format_whole(reach["median"])
    return f"{turns} ({reached} of {len(each)})"
