"""From YAML files and the command line to one configuration: layered, typed, `auto` resolved, checked.

Defaults, those of the environment for this kind of model over them, every `--config FILE` in turn,
`--section.option VALUE`.
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

from hiper_fast import estimators, strict_yaml
from hiper_fast.agent import tiny
from hiper_fast.config import SHORT, Config
from hiper_fast.envs.family import Family, families
from hiper_fast.learn import demonstrations
from hiper_fast.options import (
    NONE,
    ConfigError,
    Option,
    Setting,
    find_option,
    flatten,
    list_options,
    read_value,
    set_options,
    show,
    show_name,
    suggest_options,
)
from hiper_fast.rollout import engines
from hiper_fast.runs.folder import CHECKPOINT_CONFIG, CONFIG, find_run_folder

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"
ENVIRONMENT, ENGINE, MODEL = "env.name", "rollout.engine", "model.path"
DEVICE, PLANNED = "model.device", "plan.gpu"
ON_GPU = (("default on a GPU", "model.dtype", "bfloat16"),)  # of pretrained models
CHOICES = {ENVIRONMENT: families.find, ENGINE: engines.find}  # they bring options to their section
COMMON = list_options(Config())  # which every environment and engine has
TINY = "tiny"
LONGEST_NAME = 200  # bytes of a run's name: file systems take 255
NOT_DEFAULTS = MODEL, "plan."  # what a recipe says of the paper's own runs
DEFAULTS_HELP = (
    "In brackets: the default; where it depends on the model, that of the tiny one, and that of a pretrained one "
    "(--model FOLDER or hub id), which has the paper's settings."
)


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with a command line."""

    def error(self, message: str) -> None:
        raise ConfigError(f"{COMMAND_LINE}: {message}")


def parse(
    argv: Sequence[str] | None, *, program: str, description: str, run: Path | None = None
) -> Config:
    """The configuration that a command line asks for; `run`: a run's config.yaml, below all files.

    Errors end the program with one line that names the option (exit status 2); `--help` lists every
    option of the chosen environment and engine. That a run was of another environment is said in one line.
    """
    parser = Parser(
        prog=f"python -m hiper_fast.{program}",
        usage="%(prog)s [--config FILE ...] [--section.option VALUE ...]",
        description=description,
        epilog=DEFAULTS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    try:
        config, own = read_command_line(parser, argv, run)
    except (ConfigError, OSError) as error:  # of a run's folder that cannot be looked into
        told = error if isinstance(error, ConfigError) else show_name(error)
        parser.exit(2, f"{parser.prog}: {told}\n")
    if own and (trained := name_choice(ENVIRONMENT, own)) != config.env.name:
        print(f"This checkpoint was trained on {trained}; the settings of {config.env.name} apply.")
    return config


def read_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Path | None
) -> tuple[Config, list[Setting]]:
    """The configuration, and the settings of the run that it goes on with or looks at, if any."""
    own = list(read_file(run)) if run else []
    given = read_arguments(parser, argv, own)
    files = given.pop("config", [])
    if given.get("run.resume_from", NONE[0]) not in NONE:
        given["run.resume"] = True
    config = resolve(files, given, own)
    if config.run.resume:
        own = read_run(find_run_folder(config))
        config = resolve([], given, own)
    return config, own


def read_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, own: Sequence[Setting] = ()
) -> dict[str, Any]:
    """What a command line gives of the parser's arguments, `config` and the options of its environment and engine.

    own: settings below those of the command line, which may name them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    first.add_argument("--config", action="append")
    first.add_argument("--env", f"--{ENVIRONMENT}", dest=ENVIRONMENT)
    first.add_argument(f"--{ENGINE}", dest=ENGINE)
    chosen = vars(first.parse_known_args(argv)[0])
    files = read_files(chosen.pop("config", []))
    settings = [*own, *files, *name_source(chosen)]
    add_options(parser, settings)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(unknown[0], list_options(make_config(settings)))
    return vars(arguments)


def refuse(argument: str, known: dict[str, Option]) -> None:
    """ConfigError for an argument that is no option."""
    name = argument.partition("=")[0].lstrip("-")
    if argument.startswith("-"):
        find_option(known, name, COMMAND_LINE, SHORT)
    mend = (
        f"write --{name}"
        if SHORT.get(name, name) in known
        else "options are --section.option VALUE"
    )
    raise ConfigError(f"{COMMAND_LINE}: unexpected argument {show(argument)}; {mend}")


def add_options(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    """Gives the parser `--config`, `--help` and every option of the environment and engine that `settings` name."""
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file of options, or a shipped recipe's name; a later one goes over it, the command "
        "line over all",
    )
    short = {long: name for name, long in SHORT.items()}
    tiny, pretrained = (list_defaults(settings, tiny=is_tiny) for is_tiny in (True, False))
    for option in list_options(make_config(settings)).values():
        names = [f"--{name}" for name in (short.get(option.name), option.name) if name]
        defaults = describe_defaults(tiny[option.name], pretrained[option.name])
        parser.add_argument(
            *names,
            dest=option.name,
            metavar=option.name.split(".")[1].upper(),
            help=f"{option.help} [{defaults}]".replace("%", "%%"),
            **({"nargs": "?", "const": True} if option.kind is bool else {}),
        )


def describe_defaults(tiny: Any, pretrained: Any) -> str:
    words = ["none" if default is None else str(default) for default in (tiny, pretrained)]
    return words[0] if tiny == pretrained else "tiny: {}; pretrained: {}".format(*words)


def list_defaults(settings: Sequence[Setting], *, tiny: bool) -> dict[str, Any]:
    """Dotted option -> what counts where nothing is said but which environment and engine."""
    config = make_config(settings)
    set_options(config, read_defaults(find_family(settings), tiny=tiny), SHORT)
    return flatten(config)


def read_defaults(family: type[Family], *, tiny: bool) -> list[Setting]:
    """An environment's own settings: for the tiny model, or its recipe's, for a pretrained one."""
    if tiny:
        return list(read_file(family.defaults)) if family.defaults else []
    recipe = read_file(find_base(family.recipe, f"{family.__module__}: recipe"))
    return [setting for setting in recipe if not setting[1].startswith(NOT_DEFAULTS)]


def resolve(
    files: Sequence[str | Path] = (),
    given: Mapping[str, Any] | None = None,
    own: Sequence[Setting] = (),
) -> Config:
    """Defaults, the environment's, a run's `own` settings, `files`, then `given`; checked, no `auto` left."""
    settings = [*read_files(files), *name_source(given or {})]
    return settle([*select_own(own, settings), *settings])


def name_source(given: Mapping[str, Any]) -> list[Setting]:
    """The settings of a command line."""
    return [(COMMAND_LINE, name, value) for name, value in given.items()]


def settle(settings: Sequence[Setting]) -> Config:
    """Defaults, the environment's for this kind of model, then `settings`; checked, no `auto` left."""
    family, tiny = find_family(settings), is_tiny(find_text(settings, MODEL))
    defaults = read_defaults(family, tiny=tiny)
    if not tiny and is_for_gpu(settings):
        defaults = [*ON_GPU, *defaults]
    settings = [*defaults, *settings]
    config = make_config(settings)
    set_options(config, let_later_count(settings), SHORT)
    choose_automatic(config, family)
    check(config, family)
    return config


def is_for_gpu(settings: Sequence[Setting]) -> bool:
    """Whether they run, or plan, on a GPU that computes in bfloat16."""
    if find_text(settings, PLANNED) != COMMON[PLANNED].default:
        return True
    device = find_text(settings, DEVICE)
    on_gpu = device == "auto" or device.startswith("cuda")
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def let_later_count(settings: Sequence[Setting]) -> Iterator[Setting]:
    """A number of minibatches that is said after their size counts in its place."""
    for setting in settings:
        yield setting
        if setting[1] == "train.minibatches":
            yield setting[0], "train.minibatch_size", 0


def select_own(own: Sequence[Setting], settings: Sequence[Setting]) -> list[Setting]:
    """A run's own settings that count below `settings`: none of its machine, of another environment or engine none that
    suit only that one, and never what this one does not have, as an older run may."""
    whole = [*own, *settings]
    changed = [
        choice for choice in CHOICES if name_choice(choice, own) != name_choice(choice, whole)
    ]
    options = list_options(make_config(whole))
    alien = {option.name for option in options.values() if option.local}
    if ENVIRONMENT in changed:
        alien |= {option.name for option in COMMON.values() if option.per_env}
    for choice in CHOICES:
        section, known = find_section(choice), COMMON if choice in changed else options
        alien |= {name for _, name, _ in own if find_section(name) == section} - known.keys()
    return [setting for setting in own if setting[1] not in alien]


def make_config(settings: Sequence[Setting]) -> Config:
    """General defaults, with the options of the environment and engine that `settings` name."""
    config = Config()
    for choice, find in CHOICES.items():
        section, name = find_section(choice), name_choice(choice, settings)
        common = type(getattr(config, section))
        kind = getattr(find(name), "Options", common)
        if not (isinstance(kind, type) and issubclass(kind, common)):
            where = f"{common.__module__}.{common.__qualname__}"
            raise ConfigError(
                f"{choice}: {show_name(name)}: its Options are no class below {where}"
            )
        setattr(config, section, kind())
    return config


def find_section(option: str) -> str:
    return option.partition(".")[0]


def find_family(settings: Sequence[Setting]) -> type[Family]:
    """The environment's family, as the last of `settings` names it."""
    return families.find(name_choice(ENVIRONMENT, settings))


def name_choice(option: str, settings: Sequence[Setting]) -> str:
    """What the last of `settings` says of one of `CHOICES`, or its default."""
    name = find_text(settings, option)
    return name_environment(name) if option == ENVIRONMENT else name


def find_text(settings: Sequence[Setting], name: str) -> str:
    """What the last of `settings` says of an option that every run has, or its default."""
    option = COMMON[name]
    for source, given, value in reversed(settings):
        if SHORT.get(given, given) == name:
            return read_value(option, source, value)
    return option.default


def name_environment(name: str) -> str:
    if name != "auto":
        return name
    return "alfworld" if os.environ.get("ALFWORLD_DATA") else "household"


def is_tiny(path: str) -> bool:
    """Whether `model.path` is the tiny model or a checkpoint of it, by its shape or by what lies beside it."""
    if path == TINY or tiny.is_saved_in(path):
        return True
    file = Path(path) / CHECKPOINT_CONFIG
    return os.path.isfile(file) and find_text(list(read_file(file)), MODEL) == TINY


def choose_automatic(config: Config, family: type[Family]) -> None:
    """Puts what it means here in place of every `auto` but the run's name, which the folders decide."""
    config.env.name = name_environment(config.env.name)
    if config.agent.style == "auto":
        compact = "compact" in family.styles and is_tiny(config.model.path)
        config.agent.style = "compact" if compact else "reference"
    if config.model.device == "auto":
        config.model.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.warm_start.enabled == "auto":
        config.warm_start.enabled = "yes" if config.model.path == TINY else "no"
    if config.run.display == "auto":
        config.run.display = "panel" if sys.stdout.isatty() else "plain"


def check(config: Config, family: type[Family]) -> None:
    """ConfigError for names that nothing has, and for values that do not go together."""
    check_name(config.run.name)
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
    if config.train.loss == "ppo" and config.train.clip_low >= 1:
        raise ConfigError(
            f"train.clip_low: PPO clips the ratio at 1 - clip_low, which must be above 0; give less than 1 (0.2 is "
            f"usual), not {config.train.clip_low}"
        )
    demonstrations.check_name(config.warm_start.demonstrations)
    if config.agent.style not in family.styles:
        raise ConfigError(
            f"agent.style: {show(config.agent.style)} is none of {', '.join(family.styles)}"
        )
    if config.train.episodes % config.train.group:
        raise ConfigError(
            f"train.group: {config.train.episodes} episodes (train.episodes) do not make whole groups "
            f"of {config.train.group}"
        )


def check_name(name: str) -> None:
    """ConfigError for a run's name that is no folder's own: in another folder, hidden, or too long."""
    if not name.strip() or name.startswith(".") or "/" in name or os.sep in name:
        raise ConfigError(
            f"run.name: {show(name)} is no name of a folder below run.folder; leave out / and a leading dot, "
            "and say with run.folder where runs are kept"
        )
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(f"run.name: {show(name)} is longer than {LONGEST_NAME} bytes")


def read_files(files: Sequence[str | Path]) -> list[Setting]:
    return [setting for file in files for setting in read_file(file)]


def read_file(path: str | Path, hint: str = "") -> Iterator[Setting]:
    """The settings of a YAML file of sections (`env: {size: medium}`), or of the recipe of that name; over those of
    the recipe that it calls its `base`, if any. Errors name the file, and after it the `hint`."""
    source = f"--config {show_name(path)}{hint}"
    content = load_yaml(path, source)
    if isinstance(content, dict) and (base := content.pop("base", None)) is not None:
        yield from read_file(find_base(base, source))
    yield from read_sections(content, source)


def read_run(folder: Path) -> list[Setting]:
    """The settings of a run's own options."""
    return list(
        read_file(
            folder / CONFIG,
            f" (each of the run's checkpoints has a copy of it, {CHECKPOINT_CONFIG})",
        )
    )


def read_sections(content: Any, source: str) -> Iterator[Setting]:
    """The settings of sections with options below them; one with nothing below it has none."""
    expected = "expected sections such as 'train:' with options below them"
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: {expected}, got {show(content)}")
    for section, entries in content.items():
        if not isinstance(section, str):
            raise ConfigError(f"{source}: {expected}, got the key {show(section)}")
        if not isinstance(entries, dict | None):
            near = suggest_options(section, list(COMMON), [])
            raise ConfigError(
                f"{source}: {expected}, got {show(entries)} in {show(section)}; {near}"
            )
        for key, value in (entries or {}).items():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{source}: {show_name(section)}: expected the name of an option, got {show(key)}"
                )
            yield source, f"{section}.{key}", value


def find_base(name: Any, source: str) -> Path:
    """The recipe's file; never one of the same name in the current folder, which may have this very base."""
    recipes = list_recipes()
    if not isinstance(name, str) or name not in recipes:
        raise ConfigError(
            f"{source}: base: {show(name)} is none of the recipes {', '.join(recipes)}"
        )
    return recipes[name]


def load_yaml(path: str | Path, source: str) -> Any:
    names = list_recipes()
    is_recipe = str(path) in names and not os.path.isfile(path)
    try:
        content = strict_yaml.load(names[str(path)] if is_recipe else Path(path))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(path), names, n=1)
        hint = (
            f"did you mean the recipe {near[0]}?" if near else f"the recipes are {', '.join(names)}"
        )
        raise ConfigError(f"{source}: cannot be read ({error.strerror}); {hint}") from None
    except (OSError, ValueError) as error:  # no file has a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{source}: cannot be read ({reason})") from None
    return {} if content is None else content


def list_recipes() -> dict[str, Path]:
    """Name -> file of the shipped recipes."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
