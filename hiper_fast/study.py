"""A study: arms that differ in some options, each run with the same seeds; and the runs that it takes.

`base:`, `arms:` and `seeds:` of a YAML file say which (docs/compare.md). All arms of a seed that would
imitate alike start from one warm start, a run of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hiper_fast import estimators
from hiper_fast.config import Config
from hiper_fast.configure import load_yaml, read_file, read_sections, settle
from hiper_fast.options import (
    ConfigError,
    Setting,
    flatten,
    list_local,
    list_options,
    show,
    suggest,
)
from hiper_fast.runs import checkpoint
from hiper_fast.runs.folder import replace_text

STUDY = "study.yaml"
KEYS = "config", "base", "arms", "seeds"
OWN = (
    "run.name",
    "run.folder",
    "run.seed",
    "run.resume",
    "run.resume_from",
)  # what a study sets of a run
GROUP = 8  # episodes of a game, where an estimator that is given by its name alone compares them
WARM_START = "warm-start"
IMITATED_SECTIONS = "env", "agent", "model", "warm_start"  # what a warm start depends on, but for
NOT_IMITATED = "agent.temperature", "agent.batch_tokens", "agent.fallback", "model.critic"
IMITATED_TRAINING = "optimizer", "master_weights", "weight_decay", "grad_clip", "microbatch_tokens"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a study; its options name its folder, below the study's."""

    arm: str
    config: Config
    start: Run | None = None  # the warm start that it begins from

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder) / self.config.run.name

    @property
    def saved(self) -> Path | None:
        """Its newest checkpoint."""
        return checkpoint.latest(self.folder / "checkpoints")

    @property
    def is_finished(self) -> bool:
        return bool(self.saved) and checkpoint.step_of(self.saved) >= self.config.train.updates


@dataclass(frozen=True, slots=True)
class Study:
    folder: Path
    arms: dict[str, Config]  # name -> the options of its runs, but for those that the study sets
    seeds: list[int]

    def list_runs(self) -> list[Run]:
        """Every arm's, seed by seed, so that a study that is stopped early has whole seeds."""
        return [run for seed in self.seeds for run in self.list_runs_of(seed)]

    def list_runs_of(self, seed: int) -> list[Run]:
        starts: dict[str, Run] = {}
        runs = []
        for name, options in self.arms.items():
            config = self.assign(options, f"{name_folder(name)}-seed{seed}", seed)
            start = None
            if config.warm_start.enabled == "yes":
                kind = name_imitation(config)
                start = starts.setdefault(kind, self.prepare_start(config, kind))
                config.model.path = str(start.folder / "checkpoints" / "step-000000")
                config.warm_start.enabled = "no"
            runs.append(Run(name, config, start))
        return runs

    def prepare_start(self, config: Config, kind: str) -> Run:
        seed = config.run.seed
        start = self.assign(config, f"{WARM_START}-{kind}-seed{seed}", seed)
        start.train.updates = 0
        return Run("warm start", start)

    def assign(self, config: Config, name: str, seed: int) -> Config:
        """A copy of `config` with what a study sets."""
        config = copy.deepcopy(config)
        config.run.folder, config.run.name, config.run.seed = str(self.folder), name, seed
        return config


def name_folder(arm: str) -> str:
    return re.sub(r"\W+", "-", arm.lower()).strip("-")


def name_imitation(config: Config) -> str:
    """Letters that are the same where a seed's imitation is; an option at its default does not count."""
    training = [f"train.{name}" for name in IMITATED_TRAINING]
    defaults = {name: option.default for name, option in list_options(config).items()}
    options = {
        name: value
        for name, value in flatten(config).items()
        if (name.split(".")[0] in IMITATED_SECTIONS or name in training)
        and name not in NOT_IMITATED
        and value != defaults[name]
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:6]


def read_study(
    content: dict[str, Any], source: str, folder: Path, given: Sequence[Setting] = ()
) -> Study:
    """The study of a file's content; `given` settings go over every arm's own. ConfigError if it is none."""
    base = read_base(content, source)
    arms = content.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise ConfigError(f"{source}: arms: expected a name and options for each, as 'HAE: {{}}'")
    configs: dict[str, Config] = {}
    for name, sections in arms.items():
        own = read_sections(sections or {}, f"{source}: arm {name}")
        configs[str(name)] = settle_arm([*base, *own, *given], f"{source}: arm {name}")
    folders = [name_folder(name) for name in configs]
    for name, own in zip(configs, folders, strict=True):
        if not own or own.startswith(WARM_START) or folders.count(own) > 1:
            raise ConfigError(f"{source}: arm {name!r}: its runs need a folder name of their own")
    check_panel(configs, source)
    return Study(folder, configs, read_seeds(content.get("seeds", 1), source))


def check_panel(configs: dict[str, Config], source: str) -> None:
    """ConfigError unless all arms are evaluated alike."""
    first, *others = configs
    for name in others:
        if configs[name].eval != configs[first].eval:
            raise ConfigError(
                f"{source}: arm {name}: eval: arms are compared on one panel, as {first} plays it; give its options "
                "in base"
            )


def read_base(content: Any, source: str) -> list[Setting]:
    """What all arms share: the study's configuration files, then its base."""
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected {', '.join(f'{key}:' for key in KEYS)}")
    for key in content:
        if key not in KEYS:
            near = suggest(str(key), list(KEYS), f"a study has {', '.join(KEYS)}")
            raise ConfigError(f"{source}: unknown key {key!r}; {near}")
    files = content.get("config") or []
    settings: list[Setting] = [(source, "run.threads", 1)]
    for file in [files] if isinstance(files, str) else files:
        settings += read_file(file)
    return [*settings, *read_sections(content.get("base") or {}, f"{source}: base")]


def settle_arm(settings: Sequence[Setting], source: str) -> Config:
    for where, name, _ in settings:
        if name in OWN or name.startswith("plan."):
            raise ConfigError(f"{where}: {name} is not for a study to give; leave it out")
    try:
        return settle(settings)
    except ConfigError as error:
        told = str(error).startswith(tuple(where for where, _, _ in settings))
        raise error if told else ConfigError(f"{source}: {error}") from None


def read_seeds(seeds: Any, source: str) -> list[int]:
    """As many as a number says, from 0 on, or those of a list."""
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{source}: seeds: expected how many, or a list of different ones, got {show(seeds)}"
        )
    return seeds


def write_arms(names: Iterable[str]) -> dict[str, Any]:
    """The content of a study whose arms are estimators, each by its name alone."""
    arms = {}
    for name in names:
        arms[name] = {"advantage": {"estimator": name}}
        if estimators.needs_groups(estimators.find(name)):
            arms[name]["train"] = {"group": GROUP}
    return {"arms": arms}


def select_arms(content: dict[str, Any], names: Sequence[str], source: str) -> dict[str, Any]:
    arms = content.get("arms") or {}
    for name in names:
        if name not in arms:
            near = suggest(name, list(map(str, arms)), f"it has {', '.join(map(str, arms))}")
            raise ConfigError(f"--arms: {source} has no arm {name!r}; {near}")
    return {**content, "arms": {name: arms[name] for name in names}}


def load_study(path: Path) -> dict[str, Any]:
    """A study file's content. ConfigError if there is none."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such study")
    return load_yaml(path, str(path))


def check_recorded(study: Study) -> None:
    """ConfigError if the study's folder holds another one, unless it only grows."""
    file = study.folder / STUDY
    if file.exists():
        check_growth(read_study(load_study(file), str(file), study.folder), study)


def record_study(study: Study) -> None:
    """Writes what the study is into its folder."""
    arms = {name: list_sections(config) for name, config in study.arms.items()}
    content = {"seeds": study.seeds, "arms": arms}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    replace_text(study.folder / STUDY, text)


def check_growth(old: Study, new: Study) -> None:
    """ConfigError unless all that the old study has is in the new one as it was."""
    changes = [f"seed {seed} is gone" for seed in old.seeds if seed not in new.seeds]
    for name, config in old.arms.items():
        if name not in new.arms:
            changes.append(f"arm {name} is gone")
            continue
        was, now = list_compared(config), list_compared(new.arms[name])
        changes += [
            f"arm {name}: {option} was {was.get(option)}, is {now.get(option)}"
            for option in was.keys() | now.keys()
            if was.get(option) != now.get(option)
        ]
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise ConfigError(
            f"{old.folder} holds another study: {sorted(changes)[0]}{more}; arms and seeds can be added to it, "
            "anything else needs another --folder"
        )


def list_compared(config: Config) -> dict[str, Any]:
    """Dotted option -> value, of all that make a difference to an arm's results."""
    local = list_local(config)
    return {
        name: value
        for name, value in flatten(config).items()
        if name not in local and name not in OWN and not name.startswith("plan.")
    }


def list_sections(config: Config) -> dict[str, dict[str, Any]]:
    """The same, as sections of options."""
    kept = list_compared(config)
    return {
        section: own
        for section, entries in dataclasses.asdict(config).items()
        if (own := {key: v for key, v in entries.items() if f"{section}.{key}" in kept})
    }
