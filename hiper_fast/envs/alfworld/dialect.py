"""How a game file's own grammar words its commands: as since ALFWorld 0.4, or as before."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..base import GameError

PUT = {  # a template of PutObject -> its verb, and what stands before the receptacle
    "move {o} to {r}": ("move", "to"),
    "put {o} in/on {r}": ("put", "in/on"),
}
_ARRIVALS = {  # what is said on arrival -> whether it names the location
    "You arrive at {r.name}.": False,
    "You arrive at {lend.name}.": True,
}
_TEMPLATES = {
    "GotoLocation": "go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]",
    "OpenObject": "open {r}",
    "CloseObject": "close {r}",
    "PickupObject": "take {o} from {r}",
    "CleanObject": "clean {o} with {r}",
    "HeatObject": "heat {o} with {r}",
    "CoolObject": "cool {o} with {r}",
    "ToggleObject": "use {o}",
    "SliceObject": "slice {co} with {ko}",
    "examineReceptacle": "examine {r}",
    "examineObject": "examine {o}",
    "inventory": "inventory",
    "look": "look",
    "help": "help",
}
_UNUSED = {  # in the official grammar, but in no domain
    "PickupObjectFromReceptacleObject",
    "PickupEmptyReceptacleObject",
    "PickupFullReceptacleObject",
    "PutObjectInReceptacleObject",
    "PutEmptyReceptacleObjectinReceptacle",
    "PutFullReceptacleObjectInReceptacle",
}
_ACTION = re.compile(r'action\s+(\w+)\s*\{\s*template\s*::\s*("""|")(.*?)\2', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the grammars that ALFWorld has had."""

    put: str = "move"  # "move mug 1 to desk 1"
    into: str = "to"
    names_location: bool = False  # "You arrive at loc 4.", not at desk 1
    helps: bool = True  # "help" is a command


@lru_cache(maxsize=64)  # games differ in their task alone
def read_dialect(grammar: str) -> Dialect:
    """Of a game file's grammar; one without actions leaves the words to `Dialect`.

    Raises GameError, with what the grammar says, where no words that can be played are in it.
    """
    templates = {name: " ".join(text.split()) for name, _, text in _ACTION.findall(grammar)}
    if not templates:
        return Dialect()
    helps = "help" in templates
    for action, template in _TEMPLATES.items():
        if helps or action != "help":
            _check_template(templates, action, [template])
    _check_template(templates, "PutObject", PUT)
    if unknown := templates.keys() - _TEMPLATES.keys() - _UNUSED - {"PutObject"}:
        raise GameError(f"its grammar has an action unknown to ALFWorld: {min(unknown)}")
    put, into = PUT[templates["PutObject"]]
    answer = f"You {put} the {{o.name}} {into} the {{r.name}}."
    arrivals = [text for text in _ARRIVALS if text in grammar]
    if answer not in grammar:
        raise GameError(f"its grammar does not answer PutObject by {answer!r}")
    if len(arrivals) != 1:
        raise GameError(f"its grammar does not answer GotoLocation by {_spell(_ARRIVALS)}")
    return Dialect(put, into, _ARRIVALS[arrivals[0]], helps)


def _check_template(templates: dict[str, str], action: str, known: Iterable[str]) -> None:
    if action not in templates:
        raise GameError(f"its grammar has no action {action}")
    if templates[action] not in known:
        raise GameError(
            f"its grammar says {templates[action]!r} for {action}; only {_spell(known)} can be played"
        )


def _spell(texts: Iterable[str]) -> str:
    return " or ".join(map(repr, texts))
