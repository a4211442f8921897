"""A run as one self-contained page, its `report.html`.

Curves and tables are drawn here, as HTML and SVG; the episode viewer gets its data as JSON and is
drawn by `page/viewer.js`. Nothing is loaded from elsewhere, and no text of a run is ever taken for
markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from hiper_fast import response
from hiper_fast.runs.charts import WIDE, Format, Point, Series, draw_chart, draw_intervals
from hiper_fast.runs.folder import replace_text
from hiper_fast.runs.formats import format_decimal, format_percent, format_seconds
from hiper_fast.runs.health import Alert, Health, read_finite, read_learned, read_number
from hiper_fast.runs.metrics import read_metrics, wilson

PAGE = Path(__file__).parent / "page"
SHOWN_STEPS = 24  # steps whose episodes the viewer holds, spread evenly over the run
SHOWN_EPISODES = 12  # per step and stage
FULL_COLOUR = 0.95  # the quantile of |advantage| that is shown in full colour
LEAST_SCALE = 1e-4
DIGITS = 4  # of rewards, advantages and values
AREA_COLOURS = 5
LEVELS = {"switch": "switch", "subgoal": "high", "action": "low"}
ROLES, HEADS = tuple(LEVELS), tuple(LEVELS.values())

Row = dict[str, Any]


def build(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from config.yaml, metrics.jsonl and episodes/, if there."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder at {run_dir}; give a folder like runs/<name>")
    rows = read_metrics(run_dir / "metrics.jsonl")
    config_file = run_dir / "config.yaml"
    config = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    train, evals = _select_stage(rows, "train"), select_evaluations(rows)
    warm = _select_stage(rows, "warm_start")
    start = "Warm start" if warm else "Before training"
    viewer, note = _read_episodes(run_dir / "episodes")
    page = Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        name=escape(run_dir.resolve().name),
        summary=escape(_summarize(config)),
        config=escape(config or "no config.yaml"),
        figures=_draw_cards(rows, train, evals, start),
        success=_draw_success(train, evals, warm),
        health=_draw_health(rows),
        tasks=_draw_task_table(evals, start),
        charts=_draw_charts(rows),
        note=escape(note),
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=(PAGE / "viewer.js").read_text(encoding="utf-8"),
        data=_dump_for_script(viewer),
    )
    return replace_text(run_dir / "report.html", page, errors="replace")


def _select_stage(rows: Iterable[Row], stage: str) -> list[Row]:
    """The stage's rows by step; of several with one step, the last."""
    by_step = {row["step"]: row for row in rows if row["stage"] == stage}
    return [by_step[step] for step in sorted(by_step)]


def select_evaluations(rows: Iterable[Row]) -> list[Row]:
    """Evaluation rows that have a success rate, each with its interval."""
    evals = []
    for row in _select_stage(rows, "eval"):
        rate = read_number(row, "eval/success")
        if rate is None:
            continue
        low, high = read_number(row, "eval/low"), read_number(row, "eval/high")
        if low is None or high is None:
            low, high = _compute_interval(rate, row.get("eval/episodes"))
        evals.append({**row, "eval/low": low, "eval/high": high})
    return evals


def _compute_interval(rate: float, episodes: Any) -> tuple[float, float]:
    n = int(read_finite(episodes) or 0)
    return wilson(round(min(1.0, max(0.0, rate)) * n), n)


def _summarize(config: str) -> str:
    """One line that says what ran: environment, model, estimator, seed, size."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        tree = None

    def find(path: str) -> Any:
        node = tree
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    parts = [
        ("env.name", "{}"),
        ("env.size", "{}"),
        ("env.eval_split", "{}"),
        ("model.path", "model {}"),
        ("advantage.estimator", "{}"),
        ("train.episodes", "{} episodes per update"),
        ("train.lr", "lr {}"),
        ("run.seed", "seed {}"),
    ]
    return "  ·  ".join(form.format(find(path)) for path, form in parts if find(path) is not None)


def _draw_cards(rows: list[Row], train: list[Row], evals: list[Row], start: str) -> str:
    cards = _draw_rate_cards(evals, start)
    if train and not evals:
        rate = format_percent(read_number(train[-1], "rollout/success"))
        cards.append(_draw_card("Success in training", rate, "no evaluation yet"))
    if train:
        episodes = read_number(train[-1], "episodes")
        note = f"{int(episodes):,} episodes" if episodes else ""
        cards.append(_draw_card("Updates", f"{train[-1]['step']:,}", note))
    # The warm start's rows count from its beginning, so its last one is its length.
    warm = _add_up(rows, "warm_start", "time/demonstrations")
    warm += _add_up(_select_stage(rows, "warm_start")[-1:], "warm_start")
    trained, evaluated = _add_up(rows, "train"), _add_up(rows, "eval", "time/eval")
    if total := warm + trained + evaluated:
        begun = f"{format_seconds(warm)} warm start, " if warm else ""
        note = f"{begun}{format_seconds(evaluated)} eval"
        cards.append(_draw_card("Time", format_seconds(total), note))
    return "".join(cards) or '<p class="empty">Nothing has been logged yet.</p>'


def _draw_rate_cards(evals: list[Row], start: str) -> list[str]:
    ends, cards = _select_ends(evals), []
    for row, kind in zip(ends, ("", "main"), strict=False):
        bounds = f"{format_percent(row['eval/low'])} – {format_percent(row['eval/high'])}, 95 %"
        rate = format_percent(row["eval/success"])
        cards.append(_draw_card(_name_update(row, start), rate, bounds, kind))
    if len(ends) > 1:
        gain = 100 * (ends[-1]["eval/success"] - ends[0]["eval/success"])
        cards.append(_draw_card("Change", f"{gain:+.1f}", "points on unseen games"))
    return cards


def _select_ends(evals: list[Row]) -> list[Row]:
    """The first and the last, where there are two."""
    return evals[:1] + evals[1:][-1:]


def _name_update(row: Row, start: str) -> str:
    return f"Update {row['step']}" if row["step"] else start


def _draw_card(label: str, figure: str, note: str = "", kind: str = "") -> str:
    return (
        f'<div class="figure {kind}"><span class="label">{escape(label)}</span>'
        f'<span class="value">{escape(figure)}</span>'
        f'<span class="note">{escape(note)}</span></div>'
    )


def _add_up(rows: Iterable[Row], stage: str, key: str = "time/total") -> float:
    return sum(read_number(row, key) or 0.0 for row in rows if row["stage"] == stage)


def _draw_health(rows: list[Row]) -> str:
    """What the run warned of, and whether it is over."""
    alerts = Health(rows).alerts
    if not alerts:
        told = "Nothing to warn of." if _select_stage(rows, "train") else "No update yet."
        return f'<p class="empty">{told}</p>'
    header = "".join(
        f"<th>{name}</th>"
        for name in ("Updates", "What is wrong", "Measured", "What usually mends it")
    )
    lines = "".join(map(_draw_alert, alerts))
    return f"<table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>"


def _draw_alert(alert: Alert) -> str:
    ends = "now" if alert.until is None else f"{alert.until - 1:,}"
    measured = f"{alert.metric} {format_decimal(alert.value)}, {alert.rule.limit.text}"
    state = "open" if alert.until is None else "mended"
    return (
        f'<tr class="{state}"><td class="bounds">{alert.since:,} – {ends}</td>'
        f"<td>{escape(alert.rule.wrong)}</td><td>{escape(measured)}</td>"
        f"<td>{escape(alert.rule.cure)}</td></tr>"
    )


def _draw_task_table(evals: list[Row], start: str) -> str:
    if not evals:
        return '<p class="empty">No evaluation yet.</p>'
    ends = _select_ends(evals)
    header = "".join(f'<th colspan="2">{_name_update(row, start)}</th>' for row in ends)
    prefix = "eval/success/"
    names = {key.removeprefix(prefix) for row in ends for key in row if key.startswith(prefix)}
    lines = "".join(_draw_task(name, ends) for name in [*sorted(names), None])
    return (
        f'<table><thead><tr><th>Task</th>{header}<th class="axis"><span>0</span>'
        "<span>success, 95 % interval</span><span>100 %</span></th></tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _draw_task(name: str | None, evals: list[Row]) -> str:
    """The table's line of a kind of task; no name: of all tasks."""
    suffix = "" if name is None else f"/{name}"
    cells, intervals = [], []
    for row in evals:
        rate = read_number(row, f"eval/success{suffix}")
        if rate is None:
            cells.append('<td class="number">–</td><td></td>')
            continue
        n = read_number(row, f"eval/episodes{suffix}")
        low, high = _compute_interval(rate, n) if name else (row["eval/low"], row["eval/high"])
        intervals.append(("last" if row is evals[-1] else "first", rate, low, high))
        games = f"{int(n)} games" if n else ""
        cells.append(
            f'<td class="number">{format_percent(rate)}</td>'
            f'<td class="bounds">{100 * low:.0f} – {100 * high:.0f}<span>{games}</span></td>'
        )
    label = "All" if name is None else name.replace("_", " ")
    kind = ' class="all"' if name is None else ""
    bars = draw_intervals(intervals)
    return f"<tr{kind}><td>{escape(label)}</td>{''.join(cells)}<td>{bars}</td></tr>"


def _draw_success(train: list[Row], evals: list[Row], warm: list[Row]) -> str:
    steps = sorted({row["step"] for row in [*train, *evals]})
    if not steps:
        return '<p class="empty">No update yet.</p>'
    raw = _read_column(train, "rollout/success", steps)
    window = max(5, len(train) // 20)
    series = [
        Series("training", "faint", raw),
        Series(f"training, mean of {window}", "a", _smooth(raw, window)),
    ]
    teacher = read_number(warm[-1], "warm_start/teacher") if warm else None
    if teacher is not None:
        series.append(Series("scripted player", "s2", [teacher] * len(steps)))
    keys = ("step", "eval/success", "eval/low", "eval/high")
    points = [Point(*map(row.get, keys)) for row in evals]
    options = {"size": WIDE, "limits": (0.0, 1.0), "points": points}
    return draw_chart("Success rate", steps, series, format_percent, **options)


def _draw_charts(rows: list[Row]) -> str:
    warm, train, evals = (_select_stage(rows, name) for name in ("warm_start", "train", "eval"))
    plans: list[tuple[str, list[Row], str, str, Format]] = [
        (
            "Segment length, turns",
            train,
            "rollout/segment_length",
            "segment length",
            format_decimal,
        ),
        ("Switch rate", train, "rollout/switch_rate", "switch rate", format_percent),
        ("Valid rate", train, "rollout/valid_rate", "valid rate", format_percent),
        ("Turns per episode", train, "rollout/turns", "turns", format_decimal),
        ("Reward per episode", train, "rollout/reward", "reward", format_decimal),
        ("KL to the reference policy", train, "loss/kl", "KL", format_decimal),
        ("Policy loss", train, "loss/policy", "policy loss", format_decimal),
        ("Value loss", train, "loss/value", "value loss", format_decimal),
        ("Entropy", train, "loss/entropy", "entropy", format_decimal),
        ("Clip fraction", train, "loss/clip_fraction", "clip fraction", format_percent),
        (
            "Engine against trainer, mean difference of log-probs",
            train,
            "fidelity/logprob_mean_abs",
            "difference",
            format_decimal,
        ),
        ("Gradient norm", train, "optim/grad_norm", "gradient norm", format_decimal),
        ("Turns per episode, evaluation", evals, "eval/turns", "turns", format_decimal),
        ("Warm start: imitation loss", warm, "loss/imitation", "imitation loss", format_decimal),
        ("Warm start: accuracy", warm, "warm_start/accuracy", "accuracy", format_percent),
    ]
    charts = []
    for title, source, key, label, form in plans:
        steps = [row["step"] for row in source]
        values = _read_column(source, key, steps)
        if any(value is not None for value in values):
            charts.append(draw_chart(title, steps, [Series(label, "a", values)], form))
    charts += _draw_split_charts(train)
    charts.append(_draw_times(train))
    return "".join(charts) or '<p class="empty">No update yet.</p>'


def _draw_split_charts(train: list[Row]) -> Iterable[str]:
    """What is measured of each role, and of each of the critic's heads: a line each."""
    plans: list[tuple[str, str, tuple[str, ...], Format]] = [
        ("Entropy by role", "policy/entropy", ROLES, format_decimal),
        ("KL by role", "policy/kl", ROLES, format_decimal),
        ("Clip fraction by role", "policy/clip_fraction", ROLES, format_percent),
        ("Explained variance of returns", "value/explained", HEADS, format_decimal),
    ]
    steps = [row["step"] for row in train]
    for title, prefix, names, form in plans:
        columns = [_read_column(train, f"{prefix}_{name}", steps) for name in names]
        if any(value is not None for values in columns for value in values):
            series = [
                Series(name, f"s{index}", values)
                for index, (name, values) in enumerate(zip(names, columns, strict=True))
            ]
            yield draw_chart(title, steps, series, form)


def _draw_times(train: list[Row]) -> str:
    """Seconds per update, its stages stacked."""
    keys = dict.fromkeys(key for row in train for key in row if key.startswith("time/"))
    keys.pop("time/total", None)
    if not keys:
        return ""
    steps = [row["step"] for row in train]
    series = []
    for index, key in enumerate(keys):
        values = [value or 0.0 for value in _read_column(train, key, steps)]
        kind = f"area s{index % AREA_COLOURS}"
        series.append(Series(key.removeprefix("time/"), kind, values))
    return draw_chart("Time per update", steps, series, format_seconds, stacked=True)


def _read_column(rows: list[Row], key: str, steps: list[int]) -> list[float | None]:
    by_step = {row["step"]: read_learned(row, key) for row in rows}
    return [by_step.get(step) for step in steps]


def _smooth(values: list[float | None], window: int) -> list[float | None]:
    """The mean of the last `window` values that are there."""
    smooth, recent = [], []
    for value in values:
        if value is not None:
            recent = [*recent, value][-window:]
        smooth.append(None if value is None else sum(recent) / len(recent))
    return smooth


def _read_episodes(folder: Path) -> tuple[list[dict], str]:
    """What the viewer shows, one entry per step and stage, and a line on what was left out."""
    files = sorted(folder.glob("step-*.jsonl")) if folder.is_dir() else []
    if len(files) > SHOWN_STEPS:
        last = len(files) - 1
        files = [files[round(i * last / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    groups: dict[tuple[int, str], list[dict]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                episode = json.loads(line)
                key = int(episode["step"]), str(episode["stage"])
            except (ValueError, KeyError, TypeError):
                continue  # a half-written line
            groups.setdefault(key, []).append(episode)
    entries = []
    for (step, stage), recorded in sorted(groups.items()):
        shown = recorded[:SHOWN_EPISODES]
        episodes = [_read_episode(episode) for episode in shown]
        scale = _choose_scale(shown)
        entries.append({"step": step, "stage": stage, "scale": scale, "episodes": episodes})
    if not entries:
        return [], ""
    shown = sum(len(entry["episodes"]) for entry in entries)
    recorded = sum(map(len, groups.values()))
    note = f"{shown} of {recorded} episodes are shown; all that were recorded are in episodes/."
    return entries, note


def _read_episode(episode: dict) -> dict:
    turns = enumerate(episode.get("turns", []), 1)
    return {
        "task": str(episode.get("task", "")),
        "type": str(episode.get("task_type", "")).replace("_", " "),
        "won": bool(episode.get("won")),
        "truncated": bool(episode.get("truncated")),
        "turns": [_read_turn(turn, number) for number, turn in turns],
    }


def _read_turn(turn: dict, number: int) -> dict:
    """`number` counts from 1, as hiper_fast.play does."""
    return {
        "number": number,
        "observation": str(turn.get("observation", "")),
        "blocks": _read_pieces(turn) or cut_blocks(str(turn.get("response", ""))),
        "switch": bool(turn.get("switch")) or number == 1,
        "valid": bool(turn.get("valid")),
        "subgoal": turn.get("subgoal"),
        "reward": _round(turn.get("reward")),
        "advantage": _read_levels(turn, "advantage"),
        "value": _read_levels(turn, "value"),
    }


def _read_pieces(turn: dict) -> list[tuple[str, str]]:
    """A response as its tokens trained; none in records that do not tell (`cut_blocks`)."""
    pieces = turn.get("pieces")
    pieces = pieces if isinstance(pieces, list) else []
    pairs = [piece for piece in pieces if isinstance(piece, list) and len(piece) == 2]
    return [(str(text), block if block in ROLES else "") for text, block in pairs]


def _read_levels(turn: dict, what: str) -> dict[str, float | None]:
    return {block: _round(turn.get(f"{what}_{level}")) for block, level in LEVELS.items()}


def cut_blocks(text: str) -> list[tuple[str, str]]:
    """Cut a response into (text, block) pieces, block in {"switch", "subgoal", "action", ""}.

    Without an action block the rest of the response trains as the action, and is named so.
    """
    parsed, data = response.parse(text), text.encode("utf-8", "surrogatepass")
    spans = {
        "switch": parsed.switch_span,
        "subgoal": parsed.subgoal_span,
        "action": parsed.action_span,
    }
    present = {name: span for name, span in spans.items() if span}
    cuts = sorted({0, len(data), *(end for span in present.values() for end in span)})
    outside = "" if parsed.action_span else "action"
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        inside = [name for name, (a, b) in present.items() if a <= start and end <= b]
        piece = data[start:end].decode("utf-8", "replace")
        pieces.append((piece, inside[-1] if inside else outside))
    return pieces


def _choose_scale(episodes: list[dict]) -> float | None:
    """The advantage shown in full colour, None without any."""
    turns = [turn for episode in episodes for turn in episode.get("turns", [])]
    advantages = [turn.get(f"advantage_{level}") for turn in turns for level in LEVELS.values()]
    sizes = sorted(abs(value) for value in map(read_finite, advantages) if value is not None)
    if not sizes:
        return None
    return max(_round(sizes[int(FULL_COLOUR * (len(sizes) - 1))]), LEAST_SCALE)


def _round(value: Any) -> float | None:
    value = read_finite(value)
    return None if value is None else round(value, DIGITS)


def _dump_for_script(value: Any) -> str:
    """JSON for inside <script>: no character of it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
