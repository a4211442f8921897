"""Several runs as one page: those that differ in their seed alone are the seeds of one arm (docs/runs.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import hiper_fast
from hiper_fast.config import Config
from hiper_fast.options import ConfigError, list_local
from hiper_fast.runs.comparison import Question, compare
from hiper_fast.runs.comparison_page import write_page
from hiper_fast.runs.folder import CONFIG
from hiper_fast.runs.statistics import import_scipy_stats

ESTIMATOR = "advantage.estimator"
MOST_NAMED = 3  # options that name an arm
SHARED = "env.name", "eval.panel", "eval.episodes"
SECTIONS_ASIDE = "run.", "plan."  # that make no difference to results

Options = dict[str, Any]  # dotted option -> value


def build_several(
    folders: Sequence[Path], target: Path | None = None, local: Collection[str] = ()
) -> Path:
    """Writes `target/report.html` and `results.md` of runs as they stand now; returns the page.

    target: by default the folder `compared` beside the runs; local: options of engines and the like that are the
    machine's, beside the common ones.
    """
    import_scipy_stats()
    runs = {Path(folder): read_options(Path(folder)) for folder in folders}
    check_panel(runs)
    arms = group_runs(runs, local)
    first = runs[Path(folders[0])]
    results = {
        "study": ", ".join(arms),
        "seeds": sorted({seed for seeds in arms.values() for seed in seeds}),
        "unfinished": [],
        "panel": list_panel(first),
        "options": {name: keep(runs[min(own.values())], local) for name, own in arms.items()},
        "made_with": {"hiper_fast": hiper_fast.__version__, "scipy": version("scipy")},
        **compare(arms, Question(next(iter(arms)))),
    }
    target = (
        target or Path(os.path.commonpath([path.resolve().parent for path in runs])) / "compared"
    )
    target.mkdir(parents=True, exist_ok=True)
    return write_page(results, target)


def check_panel(runs: dict[Path, Options]) -> None:
    """ConfigError for runs that were evaluated on other games than the first."""
    (first, told), *rest = runs.items()
    for folder, options in rest:
        for name in SHARED:
            if options.get(name) != told.get(name):
                raise ConfigError(
                    f"{folder} has {name} {options.get(name)}, and {first} {told.get(name)}; runs in one page need "
                    "the same games"
                )


def read_options(folder: Path) -> Options:
    """What the run's config.yaml says; ConfigError where there is none that can be read."""
    file = folder / CONFIG
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        options = {f"{name}.{key}": v for name, own in sections.items() for key, v in own.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "no configuration"
        raise ConfigError(
            f"{file}: cannot be read ({why}); give folders like runs/<name>"
        ) from None
    if not isinstance(options.get("run.seed"), int):
        raise ConfigError(f"{file}: it names no run.seed; give folders like runs/<name>")
    return options


def keep(options: Options, local: Collection[str]) -> Options:
    """What makes a difference to results; a warm start's folder is the same for all seeds."""
    local = list_local(Config()).union(local)
    seed = f"seed{options['run.seed']}(?!\\d)"
    return {
        name: re.sub(seed, "seed", value) if name == "model.path" else value
        for name, value in options.items()
        if name not in local and not name.startswith(SECTIONS_ASIDE)
    }


def group_runs(
    runs: dict[Path, Options], local: Collection[str] = ()
) -> dict[str, dict[int, Path]]:
    """Arm -> seed -> folder, in the order given; ConfigError for two runs of one arm and seed."""
    groups: list[tuple[Options, dict[int, Path]]] = []
    for folder, options in runs.items():
        kept, seed = keep(options, local), options["run.seed"]
        own = next((seeds for known, seeds in groups if known == kept), None)
        if own is None:
            groups.append((kept, own := {}))
        if seed in own:
            raise ConfigError(
                f"{own[seed]} and {folder} are the same but for their names; leave one out"
            )
        own[seed] = folder
    names = name_arms([kept for kept, _ in groups], [min(own.values()) for _, own in groups])
    return {name: own for name, (_, own) in zip(names, groups, strict=True)}


def name_arms(arms: Sequence[Options], folders: Sequence[Path]) -> list[str]:
    """By their estimators, if that tells them apart; else by the options that differ, if few; else by their folders."""
    known = dict.fromkeys(name for arm in arms for name in arm)
    differing = [name for name in known if any(arm.get(name) != arms[0].get(name) for arm in arms)]
    ways = [[str(arm.get(ESTIMATOR)) for arm in arms]]
    if len(differing) <= MOST_NAMED:
        ways.append([", ".join(f"{n} {arm.get(n)}" for n in differing) for arm in arms])
    ways.append([re.sub(r"-seed\d+(-\d+)?$", "", folder.resolve().name) for folder in folders])
    ways.append([str(folder) for folder in folders])
    return next(names for names in ways if len(set(names)) == len(arms))


def list_panel(options: Options) -> Options:
    split = {"split": options["env.eval_split"]} if "env.eval_split" in options else {}
    own = {name.removeprefix("eval."): v for name, v in options.items() if name.startswith("eval.")}
    return {"environment": options.get("env.name"), **split, **own}
