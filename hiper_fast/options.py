"""Options as fields of dataclasses: each field says its type, choices, range and help; nothing else is taken."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import reprlib
import types
import typing
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from hiper_fast.text import escape, shorten

BOUNDS = {  # name of a bound -> (the words of its error, whether a value keeps it)
    "above": ("above", lambda value, bound: value > bound),
    "least": ("at least", lambda value, bound: value >= bound),
    "below": ("below", lambda value, bound: value < bound),
    "most": ("at most", lambda value, bound: value <= bound),
}
UPPER = {int: 2**31 - 1, float: 1e6}  # bound of a number whose option says none: int32's, a million
LONGEST = 80  # characters of a value or a name that a message repeats
LONGEST_TEXT = 4096  # characters of an option: as long as a path can be
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line and paragraph separators
MOST_NAMED = 3  # options that a misspelt one is taken for
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
NONE = ("none", "null")

Setting = tuple[
    str, str, Any
]  # where it is said (a file, or "command line"), a dotted option, its value


class ConfigError(ValueError):
    """A bad option, value or configuration file; the message names it and how to mend it.

    It is one line that a terminal can show: what cannot be printed is escaped.
    """

    def __init__(self, message: str):
        super().__init__(escape(message))


class Short(reprlib.Repr):
    """`repr` of the first items of the first levels, whatever a value holds."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 4, 4, 4
        self.maxstring = self.maxother = LONGEST

    def repr_int(self, number: int, level: int) -> str:
        huge = abs(number) >= 10**LONGEST  # Python refuses to write out what is huger still
        return f"a number of more than {LONGEST} digits" if huge else repr(number)


def show(value: Any) -> str:
    """A value as a message repeats it: as `repr`, but never long."""
    return shorten(Short().repr(value), LONGEST)


def show_name(name: Any) -> str:
    """A file's or a person's name for something, as a message repeats it: bare, but never long."""
    return shorten(escape(str(name)), 2 * LONGEST)


def option(
    default: Any,
    help: str,
    *,
    count: int | None = None,
    flag: tuple[str, str] = ("no", "yes"),
    local: bool = False,
    per_env: bool = False,
    unbounded: bool = False,
    **bounds,
):
    """A dataclass field that is an option.

    Args:
        help: the line that `--help` prints.
        bounds: above, least, below, most: each number has one, or is `unbounded`: any finite number will do.
            Without an upper one it is at most 2^31 - 1, or a million if it need not be whole.
        count: how many items a list has.
        flag: what false and true mean to a choice, where those are choices.
        local: it belongs to the machine, not to the run: a run that goes on elsewhere does not take it along.
        per_env: it suits one environment: a checkpoint that plays another does not take it along.
    """
    metadata = {
        "help": help,
        "bounds": bounds,
        "count": count,
        "flag": flag,
        "local": local,
        "per_env": per_env,
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
    per_env: bool
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
            option = Option(name, hints[entry.name], default, **entry.metadata)
            check_kind(option)
            table[name] = dataclasses.replace(option, bounds=complete_bounds(option))
    return table


def list_local(config: Any) -> set[str]:
    """The names of its options that belong to the machine, not to the run."""
    return {option.name for option in list_options(config).values() if option.local}


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


def check_kind(option: Option) -> None:
    kind = find_item_kind(option.kind)
    if kind is dict:
        return
    if kind not in (bool, int, float, str) and typing.get_origin(kind) is not Literal:
        raise ConfigError(
            f"{option.name}: a type of options is int, float, bool, str, Literal, a list of one of them, dict, "
            f"or any of these | None; not {kind}"
        )
    if kind in (int, float) and not option.bounds and not option.unbounded:
        raise ConfigError(
            f"{option.name}: a number needs a range (above, least, below, most) or unbounded=True"
        )


def find_item_kind(kind: Any) -> Any:
    """`int` of `int`, `int | None` and `list[int] | None`."""
    kind = strip_none(kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def complete_bounds(option: Option) -> dict[str, float]:
    """The option's, and an upper one if it has none."""
    upper = UPPER.get(find_item_kind(option.kind))
    if upper is None or option.unbounded or {"most", "below"} & option.bounds.keys():
        return option.bounds
    return {**option.bounds, "most": upper}


def strip_none(kind: Any) -> Any:
    """`int` of `int | None`; anything else as it is."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return parts[0] if isinstance(kind, types.UnionType) and len(parts) == 1 else kind


def set_options(config: Any, settings: Iterable[Setting], short: dict[str, str]) -> None:
    """Sets dotted options in turn; ConfigError names where a bad one is said, with what is wrong."""
    table = list_options(config)
    for source, name, value in settings:
        option = find_option(table, name, source, short)
        section, key = option.name.split(".")
        setattr(getattr(config, section), key, read_value(option, source, value))


def read_value(option: Option, source: str, value: Any) -> Any:
    try:
        return convert(option, option.kind, value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def find_option(table: dict[str, Option], name: str, source: str, short: dict[str, str]) -> Option:
    name = short.get(name, name)
    if name not in table:
        near = suggest_options(name, list(table), list(short))
        raise ConfigError(f"{source}: unknown option {show(name)}; {near}")
    return table[name]


def suggest_options(name: str, known: list[str], short: list[str]) -> str:
    """Those of this key in other sections, else of one with this word in it, else the nearest."""
    name = name[:LONGEST].lower().replace("-", "_")
    section, _, key = name.rpartition(".")
    keys = {option: option.partition(".")[2] for option in known}
    near = [name] if name in known else [option for option in known if keys[option] == key]
    if not near and section:
        near = difflib.get_close_matches(name, known, n=1)
    near = near or [option for option in known if key in keys[option].split("_")]
    if not near:
        alike = difflib.get_close_matches(key, dict.fromkeys([*short, *keys.values()]), n=1)
        near = [option for option in known if keys[option] in alike]
        near = alike if alike and alike[0] in short else near
    return ask_for(near[:MOST_NAMED]) if near else "see --help for all options"


def ask_for(names: list[str]) -> str:
    *others, last = names
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def suggest(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name[:LONGEST], known, n=1)
    return ask_for(near) if near else otherwise


def convert(option: Option, kind: Any, value: Any) -> Any:
    """`value`, of YAML or the command line, as `kind`, the option's type or a part of it; ConfigError if it is not."""
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value in NONE):
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
    return convert_text(option, value)


def convert_text(option: Option, value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise wrong_type(option, "text", value)
    text = value if isinstance(value, str) else show(value)
    if any(unicodedata.category(c) in UNSEEN for c in text):
        raise wrong_type(option, "text without control or invisible characters", value)
    if len(text) > LONGEST_TEXT:
        raise wrong_type(option, f"at most {LONGEST_TEXT} characters", value)
    return text


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
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise wrong_type(option, f"at most {LONGEST_TEXT} characters", value)
    try:
        given = yaml.load(value, PlainLoader) if isinstance(value, str) else value
        if isinstance(given, dict) and json.loads(json.dumps(given)) == given:
            return given
    except Exception:  # what yaml's constructors let through, of !!int "" or a 13th month
        pass
    raise wrong_type(option, "a mapping of names to JSON's values ({name: value})", value)


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a short text stands for little."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def convert_choice(option: Option, choices: tuple[str, ...], value: Any) -> str:
    word = spell(value)
    meant = option.flag[word in YES] if word in YES + NO else value  # YAML reads a bare yes as true
    for choice in (value, meant):
        if choice in choices:
            return choice
    raise ConfigError(f"{option.name}: {show(value)} is none of {', '.join(choices)}")


def convert_bool(option: Option, value: Any) -> bool:
    word = spell(value)
    if word not in YES + NO:
        raise wrong_type(option, "true or false", value)
    return word in YES


def spell(value: Any) -> str:
    return (value if isinstance(value, str) else show(value)).lower()


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
            raise ConfigError(f"{option.name}: must be {words} {bound}, got {show(number)}")
    return number


def wrong_type(option: Option, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{option.name}: expected {expected}, got {show(value)}")


def flatten(config: Any) -> dict[str, Any]:
    """Dotted option -> value."""
    sections = dataclasses.asdict(config).items()
    return {
        f"{section}.{key}": value for section, entries in sections for key, value in entries.items()
    }
