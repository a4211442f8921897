"""ALFWorld, played from the official `game.tw-pddl` files, letter for letter as by TextWorld.

The state is the set of PDDL facts that can change. Each command adds and deletes facts exactly as
its PDDL effect says, and texts follow the game's grammar. docs/alfworld.md lists the quirks that
are kept.
"""

from __future__ import annotations

import os
from bisect import insort
from collections.abc import Iterable, Mapping
from typing import Any

from ..base import WON_REWARD, Info, check_command, check_options
from .game import Game, parse_game
from .pddl import Fact, holds

NOTHING_HAPPENS = "Nothing happens."

_APPLIANCES = {  # receptacle type -> (verb, the ability it needs)
    "sinktype": ("clean", "cleanable"),
    "sinkbasintype": ("clean", "cleanable"),
    "microwavetype": ("heat", "heatable"),
    "fridgetype": ("cool", "coolable"),
}
_KNIVES = {"knifetype", "butterknifetype"}

_WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
_HELP = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class AlfWorld:
    """Plays one game: `AlfWorld(game)`; game is a path, a folder, a game dict or a parsed `Game`.

    `reset(options={"game": ...})` switches to another game; a seed changes nothing, the game is
    fixed.
    """

    def __init__(self, game: Game | Mapping[str, Any] | str | os.PathLike):
        self.game = parse_game(game)
        self._start_over()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        options = check_options(options, {"game"})
        if "game" in options:
            self.game = parse_game(options["game"])
        self._start_over()
        room = self._describe_surroundings(self.game.location)
        text = f"{_WELCOME}\n\n{room}\n\nYour task is to: {self.game.task}"
        return text, self._make_info()

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        command = check_command(command).strip()
        if command not in self._commands:
            return NOTHING_HAPPENS, 0.0, self._won, False, self._make_info()
        had_won = self._won
        verb, _, rest = command.partition(" ")
        text = self._ACTIONS[verb](self, rest)
        if self._changed:
            self._commands = self._list_commands()
            if not self.game.goal_atoms.isdisjoint(self._changed):
                self._won = holds(self.game.goal_formula, self._facts)
            self._changed = []
        reward = WON_REWARD if self._won and not had_won else 0.0
        return text, reward, self._won, False, self._make_info()

    def _start_over(self) -> None:
        game = self.game
        self._facts = set(game.facts)
        self._contents = dict(game.contents)
        self._here = game.start
        self._held = game.held
        self._left: set[tuple[str, str]] = set()  # (object, receptacle): taken and not put back
        self._changed: list[Fact] = []
        self._won = holds(game.goal_formula, self._facts)
        self._commands = self._list_commands()

    def _make_info(self) -> Info:
        game = self.game
        return {
            "admissible_commands": self._commands.copy(),
            "won": self._won,
            "task": game.task,
            "task_type": game.task_type,
        }

    # What the agent may do.

    def _list_commands(self) -> list[str]:
        game, held = self.game, self._held
        commands = ["inventory", "look", *["help"] * game.dialect.helps]
        commands += [
            f"go to {r}" for r, location in game.location.items() if location != self._here
        ]
        for receptacle in game.receptacles_at.get(self._here, ()):
            self._add_commands_at(receptacle, commands)
        if held is not None:
            commands.append(f"examine {held}")
            if game.type_of.get(held) in _KNIVES:
                commands += [f"slice {thing} with {held}" for thing in self._find_sliceable()]
        return sorted(set(commands))

    def _find_sliceable(self) -> list[str]:
        """What a knife can reach."""
        here, facts = self._here, self._facts
        sliceable = self.game.able["sliceable"]
        return [thing for thing in sliceable if ("objectatlocation", thing, here) in facts]

    def _add_commands_at(self, receptacle: str, commands: list[str]) -> None:
        game, held = self.game, self._held
        commands.append(f"examine {receptacle}")
        closed = False
        if receptacle in game.openable:
            closed = ("opened", receptacle) not in self._facts
            commands.append(f"open {receptacle}" if closed else f"close {receptacle}")
        for thing in self._contents.get(receptacle, ()):
            if thing in game.able["toggleable"]:
                commands.append(f"use {thing}")
            if held is None and not closed and thing in game.able["pickupable"]:
                commands.append(f"take {thing} from {receptacle}")
        if held is not None:
            if not closed and game.type_of.get(held) in game.accepts.get(receptacle, ()):
                put, into = game.dialect.put, game.dialect.into
                commands.append(f"{put} {held} {into} {receptacle}")
            verb, ability = _APPLIANCES.get(game.type_of.get(receptacle), (None, None))
            if verb and held in game.able[ability]:
                commands.append(f"{verb} {held} with {receptacle}")

    # What each command does, and says.

    def _go(self, rest: str) -> str:
        receptacle = rest.removeprefix("to ")
        self._delete("atlocation", self.game.agent, self._here)
        self._here = self.game.location[receptacle]
        self._add("atlocation", self.game.agent, self._here)
        reached = self._here if self.game.dialect.names_location else receptacle
        return f"You arrive at {reached}. {self._describe_receptacle(receptacle)}"

    def _open(self, receptacle: str) -> str:
        self._add("opened", receptacle)
        return f"You open the {receptacle}. {self._describe_receptacle(receptacle)}"

    def _close(self, receptacle: str) -> str:
        self._delete("opened", receptacle)
        return f"You close the {receptacle}."

    def _take(self, rest: str) -> str:
        thing, _, receptacle = rest.partition(" from ")
        self._delete("inreceptacle", thing, receptacle)
        self._delete("objectatlocation", thing, self._here)
        self._add("holds", self.game.agent, thing)
        self._add("holdsany", self.game.agent)
        self._held = thing
        self._left.add((thing, receptacle))
        self._contents[receptacle] = tuple(
            other for other in self._contents[receptacle] if other != thing
        )
        return f"You pick up the {thing} from the {receptacle}."

    def _put(self, rest: str) -> str:
        put, into = self.game.dialect.put, self.game.dialect.into
        thing, _, receptacle = rest.partition(f" {into} ")
        self._add("inreceptacle", thing, receptacle)
        self._add("objectatlocation", thing, self._here)
        self._delete("holds", self.game.agent, thing)
        self._delete("holdsany", self.game.agent)
        self._held = None
        self._left.discard((thing, receptacle))
        contents = [other for other in self._contents.get(receptacle, ()) if other != thing]
        insort(contents, thing, key=self.game.rank.__getitem__)
        self._contents[receptacle] = tuple(contents)
        return f"You {put} the {thing} {into} the {receptacle}."

    def _clean(self, rest: str) -> str:
        thing, _, receptacle = rest.partition(" with ")
        self._add("isclean", thing)
        return f"You clean the {thing} using the {receptacle}."

    def _heat(self, rest: str) -> str:
        thing, _, receptacle = rest.partition(" with ")
        self._add("ishot", thing)
        self._delete("iscool", thing)
        return f"You heat the {thing} using the {receptacle}."

    def _cool(self, rest: str) -> str:
        thing, _, receptacle = rest.partition(" with ")
        self._add("iscool", thing)
        self._delete("ishot", thing)
        return f"You cool the {thing} using the {receptacle}."

    def _use(self, thing: str) -> str:
        if ("ison", thing) in self._facts:
            self._delete("ison", thing)
        else:
            self._add("ison", thing)
        self._add("istoggled", thing)
        return f"You turn on the {thing}."

    def _slice(self, rest: str) -> str:
        thing, _, knife = rest.partition(" with ")
        self._add("issliced", thing)
        return f"You sliced the {thing} with the {knife}."

    def _examine(self, name: str) -> str:
        return (
            self._describe_receptacle(name)
            if name in self.game.location
            else self._describe_object(name)
        )

    def _look(self, _: str) -> str:
        return self._describe_surroundings(())

    def _inventory(self, _: str) -> str:
        return (
            f"You are carrying: a {self._held}." if self._held else "You are not carrying anything."
        )

    def _help(self, _: str) -> str:
        return _HELP

    _ACTIONS = {
        "go": _go,
        "open": _open,
        "close": _close,
        "take": _take,
        "move": _put,
        "put": _put,
        "clean": _clean,
        "heat": _heat,
        "cool": _cool,
        "use": _use,
        "slice": _slice,
        "examine": _examine,
        "look": _look,
        "inventory": _inventory,
        "help": _help,
    }

    def _add(self, *fact: str) -> None:
        self._facts.add(fact)
        self._changed.append(fact)

    def _delete(self, *fact: str) -> None:
        self._facts.discard(fact)
        self._changed.append(fact)

    # What the agent sees.

    def _describe_surroundings(self, overview: Iterable[str]) -> str:
        """The view from here; `overview` is what is listed from a place with no receptacle."""
        receptacles = self.game.receptacles_at.get(self._here)
        if not receptacles:
            seen = _join_names(f"a {receptacle}" for receptacle in overview)
            return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
        facts, location = self._facts, self.game.location
        beside = [
            (thing, receptacle)
            for thing, receptacle in self._left
            if location[receptacle] == self._here
            and ("objectatlocation", thing, self._here) in facts
        ]
        beside.sort(key=lambda pair: self.game.rank[pair[0]])
        seen = _join_names(f"a {thing}" for thing, _ in beside)
        return f"You are facing the {_join_names(receptacles)}. Next to it, you see {seen}."

    def _describe_receptacle(self, receptacle: str) -> str:
        if receptacle in self.game.openable and ("opened", receptacle) not in self._facts:
            return f"The {receptacle} is closed."
        seen = _join_names(f"a {thing}" for thing in self._contents.get(receptacle, ()))
        if receptacle in self.game.openable:
            return f"The {receptacle} is open. In it, you see {seen}."
        return f"On the {receptacle}, you see {seen}."

    def _describe_object(self, thing: str) -> str:
        facts, able = self._facts, self.game.able
        if thing in able["isreceptacleobject"]:
            seen = _join_names(f"a {inner}" for inner in self.game.inside.get(thing, ()))
            return f"This is a normal {thing}. In it, you see {seen}."
        sliced = ("issliced", thing) in facts
        temperature = (
            "hot" if ("ishot", thing) in facts else "cool" if ("iscool", thing) in facts else None
        )
        cleanness = "clean" if ("isclean", thing) in facts else None
        qualities = [quality for quality in (temperature, cleanness) if quality]
        if qualities:
            if qualities == ["cool"] and not sliced:
                qualities = ["cold"]
            return f"This is a {' and '.join(qualities)}{' sliced' if sliced else ''} {thing}."
        if thing in able["toggleable"] and ("istoggled", thing) in facts:
            return f"This {thing} is on."
        if thing in able["sliceable"] and sliced:
            return f"This is a sliced {thing}."
        return f"There's nothing special about {thing}."


def _join_names(items: Iterable[str]) -> str:
    *others, last = list(items) or ["nothing"]
    return f"{', '.join(others)}, and {last}" if others else last
