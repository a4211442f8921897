"""Things that an option names: those of a folder, those registered, those of other packages."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from hiper_fast.options import ConfigError, show, show_name, suggest
from hiper_fast.text import shorten

MOST_SAID = 120  # characters of why something cannot be loaded


class Plugins:
    """All of one kind, by name. A new file (or folder) of `package` is one, with no table to enter it in; `_`: none."""

    def __init__(
        self, kind: str, option: str, *, package: str, module: str = "", attribute: str, group: str
    ):
        """package, module, attribute: NAME is `attribute` of `package`.NAME[.module]. group: of entry points."""
        self.kind, self.option, self.package = kind, option, package
        self.module, self.attribute, self.group = f".{module}" if module else "", attribute, group
        self.registered: dict[str, Any] = {}

    def register(self, name: str, thing: Any) -> Any:
        """Gives `thing` a name for this process; returns it. ValueError if another has that name."""
        if name in self.names() and self.registered.get(name) is not thing:
            raise ValueError(f"there is an {self.kind} {name!r} already; choose another name")
        self.registered[name] = thing
        return thing

    def names(self) -> list[str]:
        """Every name that `find` knows, beside package.module:NAME."""
        paths = importlib.import_module(self.package).__path__
        modules = (entry.name for entry in pkgutil.iter_modules(paths))
        built_in = {name for name in modules if name[0] != "_" and self._has_module(name)}
        return sorted(built_in | self.registered.keys() | entry_points(group=self.group).names)

    def find(self, name: str) -> Any:
        """What `name` stands for. ConfigError, naming the option and the nearest name, if there is none."""
        if name in self.registered:
            return self.registered[name]
        if ":" in name:
            return self._load(name)
        if name.isidentifier() and name[0] != "_" and self._has_module(name):
            return getattr(
                importlib.import_module(f"{self.package}.{name}{self.module}"), self.attribute
            )
        for entry in entry_points(group=self.group, name=name):
            return self._load(entry.value)
        names = self.names()
        near = suggest(name, names, f"known: {', '.join(names)}")
        raise ConfigError(
            f"{self.option}: there is no {self.kind} {show(name)}; {near} or package.module:NAME"
        )

    def _has_module(self, name: str) -> bool:
        try:
            return importlib.util.find_spec(f"{self.package}.{name}{self.module}") is not None
        except ModuleNotFoundError:  # a file where a folder would have it
            return False

    def _load(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a module does when it is imported
            raise ConfigError(
                f"{self.option}: {show_name(path)} cannot be loaded ({shorten(str(error), MOST_SAID)}); give "
                "package.module:NAME that Python finds"
            ) from error
