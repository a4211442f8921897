"""Options as fields of dataclasses: each field says its type, choices, range and help; nothing else is taken."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from hiper_fast.text import PlainError

BOUNDS = {  # name of a bound -> (the words of its error, whether a value keeps it)
    "above": ("above", lambda value, bound: value > bound),
    "least": ("at least", lambda value, bound: value >= bound),
    "below": ("below", lambda value, bound: value < bound),
    "most": ("at most", lambda value, bound: value <= bound),
}
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
NONE = ("none", "null")

Setting = tuple[
    str, str, Any
]  # where it is said (a file, or "command line"), a dotted option, its value


class ConfigError(PlainError, ValueError):
    """A bad option, value or configuration file; the message names it and how to mend it."""


def option(
    default: Any,
    help: str,
    *,
    count: int | None = None,
    flag: tuple[str, str] = ("no", "yes"),
    local: bool = False,
    unbounded: bool = False,
    **bounds,
):
    """A dataclass field that is an option.

    Args:
        help: the line that `--help` prints.
        bounds: above, least, below, most: each number has one, or is `unbounded`: any finite number will do.
        count: how many items a list has.
        flag: what false and true mean to a choice, where those are choices.
        local: it belongs to the machine, not to the run: a run that goes on elsewhere does not take it along.
    """
    metadata = {
        "help": help,
        "bounds": bounds,
        "count": count,
        "flag": flag,
        "local": local,
        "unbounded": unbounded,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Option:
    """One option as its field declares it."""

    name: str  # dotted
    kind: Any  # its type hint
    default: Any
    help: str
    bounds: dict[str, float]
    count: int | None
    flag: tuple[str, str]
    local: bool
    unbounded: bool

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()


def list_options(config: Any) -> dict[str, Option]:
    """Dotted name -> option, of a dataclass of sections, in the order of its fields."""
    table = {}
    for section in dataclasses.fields(config):
        cls = type(getattr(config, section.name))
        check_declared(cls)
        hints, defaults = typing.get_type_hints(cls), cls()
        for entry in dataclasses.fields(cls):
            name, default = f"{section.name}.{entry.name}", getattr(defaults, entry.name)
            table[name] = Option(name, hints[entry.name], default, **entry.metadata)
            check_kind(table[name], table[name].kind)
    return table


def check_declared(cls: type) -> None:
    """ConfigError, for whoever writes options of their own, where a class does not declare them."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
        raise ConfigError(f"{where}: put @dataclass(slots=True) above the class")
    for entry in dataclasses.fields(cls):
        if "bounds" not in entry.metadata:
            raise ConfigError(
                f"{where}.{entry.name}: make it with hiper_fast.options.option(default, help)"
            )


def check_kind(option: Option, kind: Any) -> None:
    kind = strip_none(kind)
    if kind is dict:
        return
    if typing.get_origin(kind) is list:
        [kind] = typing.get_args(kind)
    if kind not in (bool, int, float, str) and typing.get_origin(kind) is not Literal:
        raise ConfigError(
            f"{option.name}: a type of options is int, float, bool, str, Literal, a list of one of them, dict, "
            f"or any of these | None; not {kind}"
        )
    if kind in (int, float) and not option.bounds and not option.unbounded:
        raise ConfigError(
            f"{option.name}: a number needs a range (above, least, below, most) or unbounded=True"
        )


def strip_none(kind: Any) -> Any:
    """`int` of `int | None`; anything else as it is."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return parts[0] if isinstance(kind, types.UnionType) and len(parts) == 1 else kind


def set_options(config: Any, settings: Iterable[Setting], short: dict[str, str]) -> None:
    """Sets dotted options in turn; ConfigError names where a bad one is said, with what is wrong."""
    table = list_options(config)
    for source, name, value in settings:
        option = find_option(table, name, source, short)
        try:
            value = convert(option, option.kind, value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        section, key = option.name.split(".")
        setattr(getattr(config, section), key, value)


def find_option(table: dict[str, Option], name: str, source: str, short: dict[str, str]) -> Option:
    name = short.get(name, name)
    if name not in table:
        near = suggest(name, [*table, *short], "see --help for all options")
        raise ConfigError(f"{source}: unknown option {name!r}; {near}")
    return table[name]


def suggest(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def convert(option: Option, kind: Any, value: Any) -> Any:
    """`value`, of YAML or the command line, as `kind`, the option's type or a part of it; ConfigError if it is not."""
    if isinstance(kind, types.UnionType):
        if value is None or value in NONE:
            return None
        kind = strip_none(kind)
    if typing.get_origin(kind) is list:
        return convert_list(option, kind, value)
    if kind is dict:
        return convert_mapping(option, value)
    if typing.get_origin(kind) is Literal:
        return convert_choice(option, typing.get_args(kind), value)
    if kind is bool:
        return convert_bool(option, value)
    if kind in (int, float):
        return convert_number(option, kind, value)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise wrong_type(option, "text", value)


def convert_list(option: Option, kind: Any, value: Any) -> list:
    items = [item for item in value.split(",") if item] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise wrong_type(option, "a list (a,b,c)", value)
    if option.count is not None and len(items) != option.count:
        raise wrong_type(option, f"{option.count} values (a,b,c)", value)
    [item_kind] = typing.get_args(kind)
    return [convert(option, item_kind, item) for item in items]


def convert_mapping(option: Option, value: Any) -> dict:
    """Names and what JSON has; a text is read as YAML."""
    try:
        given = yaml.safe_load(value) if isinstance(value, str) else value
        if isinstance(given, dict) and json.loads(json.dumps(given)) == given:
            return given
    except (yaml.YAMLError, TypeError):
        pass
    raise wrong_type(option, "a mapping of names to JSON's values ({name: value})", value)


def convert_choice(option: Option, choices: tuple[str, ...], value: Any) -> str:
    word = str(value).lower()
    meant = option.flag[word in YES] if word in YES + NO else value  # YAML reads a bare yes as true
    for choice in (value, meant):
        if choice in choices:
            return choice
    raise ConfigError(f"{option.name}: {value!r} is none of {', '.join(choices)}")


def convert_bool(option: Option, value: Any) -> bool:
    word = str(value).lower()
    if word not in YES + NO:
        raise wrong_type(option, "true or false", value)
    return word in YES


def convert_number(option: Option, kind: type, value: Any) -> int | float:
    try:
        number = kind(value)
        whole = isinstance(value, str) or number == value  # int(1.5) is 1
        fits = whole and math.isfinite(number) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise wrong_type(option, "a whole number" if kind is int else "a finite number", value)
    for name, bound in option.bounds.items():
        words, keeps = BOUNDS[name]
        if not keeps(number, bound):
            raise ConfigError(f"{option.name}: must be {words} {bound}, got {value}")
    return number


def wrong_type(option: Option, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{option.name}: expected {expected}, got {value!r}")


def flatten(config: Any) -> dict[str, Any]:
    """Dotted option -> value."""
    sections = dataclasses.asdict(config).items()
    return {
        f"{section}.{key}": value for section, entries in sections for key, value in entries.items()
    }
