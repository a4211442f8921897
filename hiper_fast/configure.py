"""From YAML files and the command line to one configuration: layered, typed, `auto` resolved, checked.

Defaults, those of the environment over them, every `--config FILE` in turn, `--section.option VALUE`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hiper_fast import estimators
from hiper_fast.config import SHORT, Config
from hiper_fast.envs.family import Family, families
from hiper_fast.learn.demonstrations import check_name
from hiper_fast.options import NONE, ConfigError, Setting, find_option, list_options, set_options
from hiper_fast.rollout import engines
from hiper_fast.runs.folder import CHECKPOINT_CONFIG, CONFIG, find_run_folder

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"
ENVIRONMENT = "env.name"


def parse(
    argv: Sequence[str] | None, *, program: str, description: str, run: Path | None = None
) -> Config:
    """The configuration that a command line asks for; `run`: a run's config.yaml, below all files.

    Errors end the program with one line that names the option (exit status 2); `--help` lists every
    option of the chosen environment.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m hiper_fast.{program}",
        usage="%(prog)s [--config FILE ...] [--section.option VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    try:
        return read_command_line(parser, argv, run)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def read_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Path | None
) -> Config:
    own = list(read_file(run, local=False)) if run else []
    given = read_arguments(parser, argv, own)
    files = given.pop("config", [])
    if given.get("run.resume_from", NONE[0]) not in NONE:
        given["run.resume"] = True
    config = resolve(files, given, own)
    if config.run.resume:
        config = resolve([], given, read_run(find_run_folder(config)))
    return config


def read_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, own: Sequence[Setting] = ()
) -> dict[str, Any]:
    """What a command line gives of the parser's arguments, `config` and the options of its environment.

    own: settings below those of the command line, which may name the environment.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--env", f"--{ENVIRONMENT}", dest=ENVIRONMENT)
    chosen, _ = first.parse_known_args(argv)
    family = find_family([*own, *read_files(chosen.config)], vars(chosen))
    add_options(parser, Config(env=family.Options()))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        if unknown[0].startswith("-"):
            name = unknown[0].lstrip("-").split("=")[0]
            find_option(list_options(Config(env=family.Options())), name, COMMAND_LINE, SHORT)
        raise ConfigError(
            f"{COMMAND_LINE}: unexpected argument {unknown[0]!r}; options are --section.option VALUE"
        )
    return vars(arguments)


def add_options(parser: argparse.ArgumentParser, config: Config) -> None:
    """Gives the parser `--config`, `--help` and every option of `config`."""
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file of options, or a shipped recipe's name; a later one goes over it, the command "
        "line over all",
    )
    short = {long: name for name, long in SHORT.items()}
    for option in list_options(config).values():
        names = [f"--{name}" for name in (short.get(option.name), option.name) if name]
        default = "none" if option.default is None else option.default
        parser.add_argument(
            *names,
            dest=option.name,
            metavar=option.name.split(".")[1].upper(),
            help=f"{option.help} [{default}]".replace("%", "%%"),
            **({"nargs": "?", "const": True} if option.kind is bool else {}),
        )


def resolve(
    files: Sequence[str | Path] = (),
    given: Mapping[str, Any] | None = None,
    own: Sequence[Setting] = (),
) -> Config:
    """Defaults, the environment's, a run's `own` settings, `files`, then `given`; checked, no `auto` left."""
    settings = [*read_files(files), *name_source(given or {})]
    family = find_family([*own, *settings], {})
    return settle([*select_own(own, family), *settings])


def name_source(given: Mapping[str, Any]) -> list[Setting]:
    """The settings of a command line."""
    return [(COMMAND_LINE, name, value) for name, value in given.items()]


def settle(settings: Sequence[Setting]) -> Config:
    """Defaults, the environment's, then `settings`; checked, no `auto` left."""
    family = find_family(settings, {})
    if family.defaults:
        settings = [*read_file(family.defaults), *settings]
    config = Config(env=family.Options())
    set_options(config, settings, SHORT)
    choose_automatic(config, family)
    check(config, family)
    return config


def select_own(own: Sequence[Setting], family: type[Family]) -> list[Setting]:
    """A run's settings without those of `env` that are none here: of another environment or an older run."""
    known = list_options(Config(env=family.Options()))
    same = find_family(own, {}) is family
    return [
        setting
        for setting in own
        if not setting[1].startswith("env.") or (same and setting[1] in known)
    ]


def find_family(settings: Sequence[Setting], given: Mapping[str, Any]) -> type[Family]:
    """The environment's family, as the last of `settings`, or `given`, names it."""
    names = [value for _, name, value in settings if SHORT.get(name, name) == ENVIRONMENT]
    return families.find(name_environment(given.get(ENVIRONMENT) or (names or ["auto"])[-1]))


def name_environment(name: str) -> str:
    if name != "auto":
        return str(name)
    return "alfworld" if os.environ.get("ALFWORLD_DATA") else "household"


def choose_automatic(config: Config, family: type[Family]) -> None:
    """Puts what it means here in place of every `auto` but the run's name, which the folders decide."""
    tiny = config.model.path == "tiny"
    config.env.name = name_environment(config.env.name)
    if config.agent.style == "auto":
        config.agent.style = "compact" if tiny and "compact" in family.styles else "reference"
    if config.model.device == "auto":
        config.model.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.warm_start.enabled == "auto":
        config.warm_start.enabled = "yes" if tiny else "no"
    if config.run.display == "auto":
        config.run.display = "panel" if sys.stdout.isatty() else "plain"


def check(config: Config, family: type[Family]) -> None:
    """ConfigError for names that nothing has, and for values that do not go together."""
    estimate = estimators.find(config.advantage.estimator)
    if estimators.needs_groups(estimate) and config.train.group < 2:
        raise ConfigError(
            f"train.group: {config.advantage.estimator} (advantage.estimator) compares episodes of one game; give "
            "2 or more, 8 is usual"
        )
    if config.reward.keep and not config.agent.subgoals:
        raise ConfigError(
            f"reward.keep: without subgoals (agent.subgoals) no turn keeps one; set it to 0, not {config.reward.keep}"
        )
    if config.train.importance_cap and config.train.old_logprobs != "recomputed":
        raise ConfigError(
            "train.importance_cap: weighs what the trainer recomputes against what was sampled; set "
            "train.old_logprobs to recomputed, or leave the cap out"
        )
    engines.find(config.rollout.engine)
    check_name(config.warm_start.demonstrations)
    if config.agent.style not in family.styles:
        raise ConfigError(
            f"agent.style: {config.agent.style!r} is none of {', '.join(family.styles)}"
        )
    if config.train.episodes % config.train.group:
        raise ConfigError(
            f"train.group: {config.train.episodes} episodes (train.episodes) do not make whole groups "
            f"of {config.train.group}"
        )


def read_files(files: Sequence[str | Path]) -> list[Setting]:
    return [setting for file in files for setting in read_file(file)]


def read_file(path: str | Path, *, local: bool = True) -> Iterator[Setting]:
    """The settings of a YAML file of sections (`env: {size: medium}`), or of the recipe of that name; over those of
    the recipe that it calls its `base`, if any.

    local: with those options that belong to the machine.
    """
    source = f"--config {path}"
    content = load_yaml(path, source)
    if isinstance(content, dict) and "base" in content:
        yield from read_file(find_base(content.pop("base"), source), local=local)
    skipped = set() if local else {o.name for o in list_options(Config()).values() if o.local}
    for setting in read_sections(content, source):
        if setting[1] not in skipped:
            yield setting


def read_run(folder: Path) -> list[Setting]:
    """The settings of a run's own options, without those that belong to the machine."""
    try:
        return list(read_file(folder / CONFIG, local=False))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; each of the run's checkpoints has a copy of it, {CHECKPOINT_CONFIG}"
        ) from None


def read_sections(content: Any, source: str) -> Iterator[Setting]:
    """The settings of sections with options below them."""
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ConfigError(f"{source}: expected sections such as 'train:' with options below them")
    for section, entries in content.items():
        for key, value in entries.items():
            yield source, f"{section}.{key}", value


def find_base(name: Any, source: str) -> Path:
    """The recipe's file; never one of the same name in the current folder, which may have this very base."""
    recipes = list_recipes()
    if str(name) not in recipes:
        raise ConfigError(f"{source}: base: {name!r} is none of the recipes {', '.join(recipes)}")
    return recipes[str(name)]


def load_yaml(path: str | Path, source: str) -> Any:
    names = list_recipes()
    file = names[str(path)] if str(path) in names and not Path(path).is_file() else Path(path)
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(path), names, n=1)
        hint = (
            f"did you mean the recipe {near[0]}?" if near else f"the recipes are {', '.join(names)}"
        )
        raise ConfigError(f"{source}: cannot be read ({error.strerror}); {hint}") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from None


def list_recipes() -> dict[str, Path]:
    """Name -> file of the shipped recipes."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
