"""Bias and variance of HAE's and flat GAE's gradient estimates on small processes, for docs/hae.md.

python benchmarks/option_mdp.py          # measures (some minutes), then draws
python benchmarks/option_mdp.py --draw   # draws what benchmarks/results/option-mdp.json holds

The short processes (two states, actions and subgoals, four turns) are exact: benchmarks/tabular.py lists every episode.
Of the long ones (four states, three actions and subgoals, sixteen turns) episodes are drawn, and variances alone told.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from curves import DARK, LIGHT, STYLE
from tabular import (
    Episodes,
    Policy,
    Tables,
    World,
    draw_normal,
    draw_policy,
    draw_world,
    estimate_each,
    evaluate,
    expect,
    find_gradient,
    find_terms,
    find_variance,
    flatten,
    give_credit,
    play,
    sample,
)
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hiper_fast.bench import describe_machine
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit
from hiper_fast.runs.charts import choose_ticks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "option-mdp.json"
WORLDS, NOISES = 20, 2  # random processes; draws of the critic's errors for each
LAMBDAS = [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0]
DEFAULT = 1.0, 0.95  # lambda_turn, lambda_segment
ERRORS = [0.0, 0.5, 1.0]  # of every value, in standard deviations of the return
LONG = {"states": 4, "actions": 3, "horizon": 16, "end": 0.05}
COPIES = 1000  # long episodes from each state
NAMES = {"hae": "HAE", "hae_no_switch": "HAE without its switch level", "gae": "flat GAE"}
WIDTH, HEIGHT, TOP, BOTTOM = 960, 330, 100, 46


@dataclass(frozen=True)
class Scene:
    """A process, a policy, and what is true of them without discounting."""

    world: World
    policy: Policy
    episodes: Episodes
    tables: Tables

    @cached_property
    def gradient(self) -> Policy:
        return find_gradient(self.world, self.policy, 1.0)

    @cached_property
    def spread(self) -> float:
        """The standard deviation of an episode's return."""
        episodes = self.episodes
        returns = torch.zeros_like(episodes.probability)
        returns = returns.index_add(0, episodes.episode, episodes.rewards)
        mean = (episodes.probability * returns).sum()
        return (episodes.probability * (returns - mean).square()).sum().sqrt().item()


def make_scene(seed: int, *, long: bool = False) -> Scene:
    g = torch.Generator().manual_seed(seed)
    world = draw_world(g, **(LONG if long else {}))
    policy = draw_policy(g, world, subgoals=3, keep=1.0) if long else draw_policy(g, world)
    episodes = play(world, policy, sample(g), copies=COPIES) if long else play(world, policy)
    return Scene(world, policy, episodes, evaluate(world, policy, 1.0))


def spoil(scene: Scene, error: float, seed: int) -> Tables:
    """Values off by independent normal noise of `error` standard deviations of the return."""
    normal = draw_normal(torch.Generator().manual_seed(seed))
    tables = []
    for table in scene.tables:
        noise = error * scene.spread * normal(*table.shape)
        noise[-1] = 0  # after the last turn there is nothing to misjudge
        tables.append(table + noise)
    return Tables(*tables)


def find_credit(scene: Scene, name: str, tables: Tables, lambdas: tuple[float, float]) -> Credit:
    config = AdvantageConfig(gamma=1.0, lambda_turn=lambdas[0], lambda_segment=lambdas[1])
    return give_credit(name, scene.episodes, flatten(tables) if name == "gae" else tables, config)


def measure(scene: Scene, name: str, tables: Tables, lambdas: tuple[float, float]) -> dict:
    """|E g - gradient| / |gradient|, and the variance of one episode's estimate by role."""
    credit = find_credit(scene, name, tables, lambdas)
    terms = find_terms(scene.policy, scene.episodes, credit)
    each = estimate_each(scene.policy, scene.episodes, terms)
    mean = [torch.einsum("e,e...->...", scene.episodes.probability, table)[None] for table in each]
    return {
        "bias": differ(mean, scene.gradient),
        "variance": find_variance(scene.episodes, each),
    }


def differ(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Relative to the norm of what is true, for a policy that is the same at every turn."""
    found, true = join(found), join(true)
    return ((found - true).norm() / true.norm()).item()


def join(tables: Sequence[Tensor]) -> Tensor:
    """The sum over turns of each, one after the other."""
    return torch.cat([table.sum(0).flatten() for table in tables])


# Curves over lambda


def sweep(*, long: bool = False) -> list[dict]:
    """A row for each process, error of the values and lambda, both of HAE's lambdas the same."""
    rows = []
    for seed in range(WORLDS):
        scene = make_scene(seed, long=long)
        unit = sum(measure(scene, "gae", scene.tables, (1.0, 1.0))["variance"])
        for error in ERRORS[: 2 if long else 3]:
            draws = range(NOISES if error and not long else 1)
            spoilt = [spoil(scene, error, 1000 * seed + draw) for draw in draws]
            for lambda_ in LAMBDAS:
                found = {
                    name: [measure(scene, name, tables, (lambda_, lambda_)) for tables in spoilt]
                    for name in NAMES
                }
                rows += [
                    {"world": seed, "error": error, "lambda": lambda_, "estimator": name}
                    | average(each, unit)
                    for name, each in found.items()
                ]
        print(f"{'long' if long else 'short'} process {seed + 1} of {WORLDS}", flush=True)
    return rows


def average(found: list[dict], unit: float) -> dict:
    """Means over the draws of errors; variances in units of flat GAE's at lambda 1 with exact values."""
    return {
        "bias": sum(one["bias"] for one in found) / len(found),
        "variance": sum(sum(one["variance"]) for one in found) / len(found) / unit,
    }


def summarise(rows: list[dict], key: str) -> list[dict]:
    """Quartiles over the processes."""
    cells = {}
    for row in rows:
        cells.setdefault((row["estimator"], row["error"], row["lambda"]), []).append(row[key])
    return [
        {"estimator": name, "error": error, "lambda": lambda_}
        | dict(zip(("low", "middle", "high"), quartiles(values), strict=True))
        for (name, error, lambda_), values in cells.items()
    ]


def quartiles(values: list[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(points)
    return [float(f"{value:.4g}") for value in found.tolist()]


# Pairs at the defaults


def compare(*, long: bool = False) -> list[dict]:
    """HAE at its defaults over flat GAE: the ratio of variances, by role, and in how many processes it is below 1."""
    rows = []
    for error in ERRORS[: 2 if long else 3]:
        pairs = {lambda_: [] for lambda_ in (0.0, 0.5, 0.95, 1.0)}
        for seed in range(WORLDS):
            scene = make_scene(seed, long=long)
            tables = spoil(scene, error, 1000 * seed)
            hae = torch.tensor(measure(scene, "hae", tables, DEFAULT)["variance"])
            for lambda_, ratios in pairs.items():
                gae = torch.tensor(measure(scene, "gae", tables, (1.0, lambda_))["variance"])
                ratios.append(torch.cat([hae.sum()[None] / gae.sum(), hae / gae]))
        for lambda_, ratios in pairs.items():
            ratios = torch.stack(ratios)  # [worlds, all and each role]
            means = ratios.log().mean(0).exp().tolist()
            names = "all", *Policy._fields
            rows.append(
                {"error": error, "lambda": lambda_, "below": int((ratios[:, 0] < 1).sum())}
                | {name: round(mean, 3) for name, mean in zip(names, means, strict=True)}
            )
    return rows


# What else is true of the short processes


def find_facts() -> dict[str, float]:
    """Medians over the processes."""
    rows = []
    for seed in range(WORLDS):
        long = weigh_first_switch(make_scene(seed, long=True))
        rows.append(find_facts_of(make_scene(seed)) | {f"{key}, long": long[key] for key in long})
    return {key: quartiles([row[key] for row in rows])[1] for key in rows[0]}


def find_facts_of(scene: Scene) -> dict[str, float]:
    def bias(name: str, tables: Tables, lambdas=DEFAULT) -> float:
        return measure(scene, name, tables, lambdas)["bias"]

    nothing = Tables(*(torch.zeros_like(table) for table in scene.tables))
    some = 0.0, 0.5, 1.0
    exact = [bias("hae", scene.tables, (a, b)) for a in some for b in some]
    return {
        "exact values, any lambda": max(exact),
        "without the switch level": bias("hae_no_switch", scene.tables),
        "values 0, hae": bias("hae", nothing),
        "values 0, gae 0.95": bias("gae", nothing),
        "values 0, gae 1": bias("gae", nothing, (1.0, 1.0)),
        **find_bias_of_each_table(scene, bias),
        **find_bias_of_discount(scene),
        **find_bias_of_truncation(scene),
        **weigh_first_switch(scene),
        **weigh_noise(scene),
        "normalised, cosine": normalise(scene),
    }


def find_bias_of_each_table(scene: Scene, bias: Callable[..., float]) -> dict[str, float]:
    """One table at a time off by half a standard deviation of the return."""
    spoilt = spoil(scene, 0.5, 0)
    facts = {}
    for name in Tables._fields:
        tables = scene.tables._replace(**{name: getattr(spoilt, name)})
        for lambdas in ((1.0, 1.0), DEFAULT, (0.95, 0.95), (0.0, 0.0)):
            facts[f"V_{name} off, lambdas {lambdas}"] = bias("hae", tables, lambdas)
    return facts


def find_bias_of_discount(scene: Scene) -> dict[str, float]:
    """gamma 0.9, each turn's terms weighted by gamma^t and not."""
    gamma = 0.9
    tables = evaluate(scene.world, scene.policy, gamma)
    config = AdvantageConfig(gamma=gamma)
    credit = give_credit("hae", scene.episodes, tables, config)
    found = expect(scene.policy, scene.episodes, find_terms(scene.policy, scene.episodes, credit))
    true = find_gradient(scene.world, scene.policy, gamma)
    factor = (gamma ** torch.arange(scene.world.horizon).double()).reshape(-1, 1, 1, 1)
    return {
        "gamma 0.9, weighted": differ([factor * x for x in found], true),
        "gamma 0.9, as trained": differ(found, true),
        "gamma 0.9, as trained, cosine": cosine_similarity(join(found), join(true), 0).item(),
    }


def find_bias_of_truncation(scene: Scene) -> dict[str, float]:
    """Cut after two of four turns: the terms of those two against their share of the whole gradient."""
    turns = 2
    episodes = play(scene.world, scene.policy, limit=turns)
    true = [table[:turns] for table in scene.gradient]
    facts = {}
    for name, after in (
        ("nothing", None), ("V_high", scene.tables.high), ("V_switch", scene.tables.switch)
    ):  # fmt: skip
        credit = give_credit("hae", episodes, scene.tables, AdvantageConfig(gamma=1.0), after)
        found = expect(scene.policy, episodes, find_terms(scene.policy, episodes, credit))
        facts[f"truncated, bootstrap {name}"] = differ([x[:turns] for x in found], true)
    return facts


def weigh_first_switch(scene: Scene) -> dict[str, float]:
    """What of the variance goes if the switch of first turns, which decides nothing, does not train."""
    credit = find_credit(scene, "hae", scene.tables, DEFAULT)
    low, high, decision = credit.levels
    later = decision.carried & (scene.episodes.columns["turn"] > 0)
    totals = []
    for carried in (decision.carried, later):
        levels = low, high, replace(decision, carried=carried)
        terms = find_terms(scene.policy, scene.episodes, Credit(levels))
        each = estimate_each(scene.policy, scene.episodes, terms)
        totals.append(find_variance(scene.episodes, each))
    return {
        "first switch, share of the switch's variance": 1 - totals[1].switch / totals[0].switch,
        "first switch, share of all variance": 1 - sum(totals[1]) / sum(totals[0]),
    }


def weigh_noise(scene: Scene) -> dict[str, float]:
    """Variance of an episode's estimate over the gradient's squared norm: so many episodes have as much of both."""
    signal = join(scene.gradient).square().sum().item()
    tables = {"exact": scene.tables, "off by half": spoil(scene, 0.5, 0)}
    return {
        f"noise over signal, values {name}": sum(measure(scene, "hae", values, DEFAULT)["variance"])
        / signal
        for name, values in tables.items()
    }


def normalise(scene: Scene) -> float:
    """The cosine to the gradient once each level has mean 0 and deviation 1 over all episodes."""
    credit = find_credit(scene, "hae", scene.tables, DEFAULT)
    weight = scene.episodes.probability[scene.episodes.episode]  # [turns]
    levels = []
    for level in credit.levels:
        of = weight * level.carried / (weight * level.carried).sum()
        centred = level.advantages - (of * level.advantages).sum()
        deviation = (of * centred.square()).sum().sqrt()
        levels.append(replace(level, advantages=centred / deviation))
    terms = find_terms(scene.policy, scene.episodes, Credit(tuple(levels)))
    found = expect(scene.policy, scene.episodes, terms)
    return cosine_similarity(join(found), join(scene.gradient), 0).item()


# Figures


def draw(title: str, note: str, panels: list[tuple[str, list[dict]]], form: str) -> str:
    """Panels over lambda side by side: medians as lines, quartiles as bands."""

    def palette(colours: list[str]) -> str:
        return " ".join(f"--run{i}: {colour};" for i, colour in enumerate(colours[: len(NAMES)]))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{title}">',
        f"<style>{STYLE % (palette(LIGHT), palette(DARK))}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        f'<text class="title" x="20" y="30">{title}</text>',
        f'<text x="{WIDTH - 20}" y="30" text-anchor="end">{note}</text>',
    ]
    for i, name in enumerate(NAMES.values()):
        x = 20 + 230 * i
        parts.append(
            f'<line class="line" style="stroke: var(--run{i})" x1="{x}" x2="{x + 16}" y1="52" y2="52"/>'
            f'<text x="{x + 22}" y="56">{name}</text>'
        )
    room = (WIDTH - 20) / len(panels)
    for i, (label, rows) in enumerate(panels):
        left = 20 + i * room
        parts += draw_panel(label, rows, (left + 36, left + room - 24), form)
    return "\n".join([*parts, "</svg>\n"])


def draw_panel(label: str, rows: list[dict], span: tuple[float, float], form: str) -> list[str]:
    left, right = span
    ceiling = 1.04 * max(row["high"] for row in rows) or 1.0

    def x(lambda_: float) -> float:
        return round(left + lambda_ * (right - left), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / ceiling * (HEIGHT - TOP - BOTTOM), 1)

    middle = (left + right) / 2
    parts = [
        f'<text x="{middle:.1f}" y="{TOP - 14}" text-anchor="middle">{label}</text>',
        f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">lambda</text>',
    ]
    for tick in choose_ticks(0, ceiling, 4):
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text x="{left - 8:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:{form}}</text>'
        )
    for tick in (0, 0.5, 1):
        parts.append(
            f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    for i, name in enumerate(NAMES):
        line = [row for row in rows if row["estimator"] == name]
        band = [f"{x(row['lambda'])},{y(row['high'])}" for row in line]
        band += [f"{x(row['lambda'])},{y(row['low'])}" for row in reversed(line)]
        parts.append(
            f'<polygon class="band" style="fill: var(--run{i})" points="{" ".join(band)}"/>'
        )
        points = " ".join(f"{x(row['lambda'])},{y(row['middle'])}" for row in line)
        parts.append(f'<polyline class="line" style="stroke: var(--run{i})" points="{points}"/>')
    return parts


def draw_figures(results: dict) -> dict[str, str]:
    """File names in docs/ and what they hold."""

    def choose(rows: list[dict], error: float) -> list[dict]:
        return [row for row in rows if row["error"] == error]

    short, long, bias = (results[key] for key in ("variance", "variance_long", "bias"))
    quartiles_of = f"median and quartiles of {results['worlds']} processes"
    labels = {0.0: "exact values", 0.5: "values off by half a deviation", 1.0: "by a whole one"}
    return {
        "hae-bias.svg": draw(
            "Bias of the gradient, as a share of its norm", f"four turns; {quartiles_of}",
            [(labels[error], choose(bias, error)) for error in ERRORS], ".0%",
        ),
        "hae-variance.svg": draw(
            "Variance of the gradient", f"1: flat GAE's at lambda 1 with exact values; {quartiles_of}",
            [("four turns, exact values", choose(short, 0.0)), ("four turns, off by a deviation", choose(short, 1.0)),
             ("sixteen turns, exact values", choose(long, 0.0)),
             ("sixteen turns, off by half", choose(long, 0.5))], "g",
        ),
    }  # fmt: skip


def measure_all() -> dict:
    short, long = sweep(), sweep(long=True)
    return {
        "date": datetime.date.today().isoformat(),
        "versions": describe_machine(),
        "worlds": WORLDS,
        "facts": find_facts(),
        "pairs": compare(),
        "pairs_long": compare(long=True),
        "bias": summarise(short, "bias"),
        "variance": summarise(short, "variance"),
        "variance_long": summarise(long, "variance"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the stored results")
    if not parser.parse_args().draw:
        torch.set_num_threads(1)
        RESULTS.write_text(json.dumps(measure_all(), indent=1) + "\n")
    for name, figure in draw_figures(json.loads(RESULTS.read_text())).items():
        (ROOT / "docs" / name).write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main()
