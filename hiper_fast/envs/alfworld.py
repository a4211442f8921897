"""ALFWorld, played from the official `game.tw-pddl` files, letter for letter as TextWorld plays them.

`Game` is a file parsed once, immutable and shared by any number of environments. `AlfWorld` plays one: its
state is the set of PDDL facts that can change, each command adds and deletes facts exactly as its PDDL effect
says, and texts follow the game's grammar. docs/alfworld.md lists the quirks that are kept.
"""

from __future__ import annotations

import json
import os
import random
import re
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import WON_REWARD, Environment, Info, check_options
from .pddl import Fact, Formula, GameError, Grounder, Problem, atoms, holds, read_problem, renamed

__all__ = ["TASK_TYPES", "AlfWorld", "AlfWorldSplit", "Game", "GameError", "Goal", "games"]

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

MAX_FILE_BYTES = 16 << 20  # official games have at most 150 kB

_STATES = {"isclean": "clean", "ishot": "hot", "iscool": "cool"}
_VERBS = {"clean": "clean", "hot": "heat", "cool": "cool"}
_ABILITIES = (
    "pickupable",
    "cleanable",
    "heatable",
    "coolable",
    "sliceable",
    "toggleable",
    "isreceptacleobject",
)
_FLUENTS = {  # the predicates that commands change -> number of arguments
    "atlocation": 2,
    "holds": 2,
    "holdsany": 1,
    "inreceptacle": 2,
    "objectatlocation": 2,
    "opened": 1,
    "isclean": 1,
    "ishot": 1,
    "iscool": 1,
    "ison": 1,
    "istoggled": 1,
    "issliced": 1,
}
_ARITY = (
    _FLUENTS
    | dict.fromkeys(_ABILITIES, 1)
    | dict.fromkeys(("openable", "moveable", "full", "isreceptacleobjectfull", "checked", "examined"), 1)
    | dict.fromkeys(("receptacleatlocation", "receptacletype", "objecttype", "cancontain"), 2)
    | dict.fromkeys(("inreceptacleobject", "wasinreceptacle"), 2)
)

_APPLIANCES = {  # receptacle type -> (verb, the ability it needs)
    "sinktype": ("clean", "cleanable"),
    "sinkbasintype": ("clean", "cleanable"),
    "microwavetype": ("heat", "heatable"),
    "fridgetype": ("cool", "coolable"),
}
_KNIVES = {"knifetype", "butterknifetype"}

_DOMAIN = re.compile(r"\(\s*define\s*\(\s*domain\s+([^\s()]+)", re.IGNORECASE)
_TASK = re.compile(r"Your task is to: ([^\"\n]*)")
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


@dataclass(frozen=True, slots=True)
class Goal:
    """What a game asks for, read off its PDDL goal. Type names are lower-case, as in the text ("soapbar")."""

    task_type: str
    object_type: str
    receptacle_type: str | None  # None for look_at_obj_in_light
    count: int  # how many objects must lie there
    state: str | None  # None, "clean", "hot" or "cool"
    lamp_type: str | None  # only for look_at_obj_in_light


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """One game, parsed once and shared. Objects, receptacles and the agent go by their names in the text."""

    name: str
    task: str
    task_type: str  # "other" where goal is None
    goal: Goal | None  # None for a goal outside the six task types
    walkthrough: tuple[str, ...]
    goal_formula: Formula = field(repr=False)
    goal_atoms: frozenset[Fact] = field(repr=False)
    facts: frozenset[Fact] = field(repr=False)  # the fluents that hold at the start
    agent: str = field(repr=False)
    start: str = field(repr=False)  # the agent's first location
    held: str | None = field(repr=False)
    rank: dict[str, int] = field(repr=False)  # name -> place in the order of ids, which listings follow
    type_of: dict[str, str] = field(repr=False)  # object or receptacle -> its PDDL type
    able: dict[str, frozenset[str]] = field(repr=False)  # ability -> the objects that have it
    openable: frozenset[str] = field(repr=False)
    location: dict[str, str] = field(repr=False)  # receptacle -> location, in id order
    receptacles_at: dict[str, tuple[str, ...]] = field(repr=False)
    contents: dict[str, tuple[str, ...]] = field(
        repr=False
    )  # receptacle -> objects at the start, in id order
    inside: dict[str, tuple[str, ...]] = field(repr=False)  # movable receptacle -> what it is said to hold
    accepts: dict[str, frozenset[str]] = field(repr=False)  # receptacle -> object types it can contain

    @classmethod
    def load(cls, path: str | os.PathLike) -> Game:
        """Parse a `game.tw-pddl` file, or the one in a folder. Raises GameError (a ValueError)."""
        path = game_file(path)
        return cls.from_dict(read_game(path), name=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "game") -> Game:
        """Build a game from the content of a game file. Raises GameError naming `name` and what is wrong."""
        try:
            return _build(data, name)
        except GameError as error:
            raise GameError(f"cannot play {name}: {error}") from None


def game_file(path: str | os.PathLike) -> Path:
    """The game file that a path names: itself, or the `game.tw-pddl` in it if it is a folder."""
    path = Path(path)
    return path / "game.tw-pddl" if path.is_dir() else path


def read_game(path: Path) -> dict[str, Any]:
    """The content of a game file. Raises GameError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise GameError(f"cannot play {path}: it is larger than {MAX_FILE_BYTES >> 20} MiB")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise GameError(f"cannot read {path}: {error.strerror}") from error
    except GameError:
        raise
    except (ValueError, RecursionError) as error:
        raise GameError(f"cannot play {path}: it is not valid JSON ({error}); is it truncated?") from None


def games(split: str) -> list[Path]:
    """The sorted game files of a split ("train", "valid_seen", "valid_unseen") under $ALFWORLD_DATA."""
    root = os.environ.get("ALFWORLD_DATA")
    if not root:
        raise ValueError("ALFWORLD_DATA is not set; point it at the folder that contains json_2.1.1")
    folder = Path(root).expanduser()
    if (folder / "json_2.1.1").is_dir():
        folder = folder / "json_2.1.1"
    if not (folder / split).is_dir():
        raise ValueError(f"no split {split!r} under ALFWORLD_DATA: {folder / split} is not a folder")
    found = sorted((folder / split).glob("*/*/game.tw-pddl"))
    if not found:
        raise ValueError(f"split {split!r} is empty: no */*/game.tw-pddl under {folder / split}")
    return found


class AlfWorld:
    """Plays one game: `AlfWorld(game)`, where game is a path, a folder, a game dict or a parsed `Game`.

    `reset(options={"game": ...})` switches to another game; a seed changes nothing, the game is fixed.
    """

    def __init__(self, game: Game | Mapping[str, Any] | str | os.PathLike):
        self.game = as_game(game)
        self._begin()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        options = check_options(options, {"game"})
        if "game" in options:
            self.game = as_game(options["game"])
        self._begin()
        text = f"{_WELCOME}\n\n{self._surroundings(self.game.location)}\n\nYour task is to: {self.game.task}"
        return text, self._info()

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        command = command.strip()
        if command not in self._commands:
            return "Nothing happens.", 0.0, self._won, False, self._info()
        had_won = self._won
        verb, _, rest = command.partition(" ")
        text = self._ACTIONS[verb](self, rest)
        if self._changed:
            self._commands = self._admissible()
            if not self.game.goal_atoms.isdisjoint(self._changed):
                self._won = holds(self.game.goal_formula, self._facts)
            self._changed = []
        reward = WON_REWARD if self._won and not had_won else 0.0
        return text, reward, self._won, False, self._info()

    def _begin(self) -> None:
        game = self.game
        self._facts = set(game.facts)
        self._contents = dict(game.contents)
        self._here = game.start
        self._held = game.held
        self._left: set[tuple[str, str]] = set()  # (object, receptacle) pairs that were undone and not redone
        self._changed: list[Fact] = []
        self._won = holds(game.goal_formula, self._facts)
        self._commands = self._admissible()

    def _info(self) -> Info:
        game = self.game
        return {
            "admissible_commands": self._commands.copy(),
            "won": self._won,
            "task": game.task,
            "task_type": game.task_type,
        }

    # What the agent may do.

    def _admissible(self) -> list[str]:
        game, held, facts = self.game, self._held, self._facts
        commands = ["help", "inventory", "look"]
        commands += [f"go to {r}" for r, location in game.location.items() if location != self._here]
        for receptacle in game.receptacles_at.get(self._here, ()):
            commands.append(f"examine {receptacle}")
            closed = False
            if receptacle in game.openable:
                closed = ("opened", receptacle) not in facts
                commands.append(f"open {receptacle}" if closed else f"close {receptacle}")
            for thing in self._contents.get(receptacle, ()):
                if thing in game.able["toggleable"]:
                    commands.append(f"use {thing}")
                if held is None and not closed and thing in game.able["pickupable"]:
                    commands.append(f"take {thing} from {receptacle}")
            if held is not None:
                if not closed and game.type_of.get(held) in game.accepts.get(receptacle, ()):
                    commands.append(f"move {held} to {receptacle}")
                verb, ability = _APPLIANCES.get(game.type_of.get(receptacle), (None, None))
                if verb and held in game.able[ability]:
                    commands.append(f"{verb} {held} with {receptacle}")
        if held is not None:
            commands.append(f"examine {held}")
            if game.type_of.get(held) in _KNIVES:
                for thing in game.able["sliceable"]:
                    if ("objectatlocation", thing, self._here) in facts:
                        commands.append(f"slice {thing} with {held}")
        return sorted(set(commands))

    # What each command does, and says.

    def _go(self, rest: str) -> str:
        receptacle = rest.removeprefix("to ")
        self._delete("atlocation", self.game.agent, self._here)
        self._here = self.game.location[receptacle]
        self._add("atlocation", self.game.agent, self._here)
        return f"You arrive at {receptacle}. {self._describe_receptacle(receptacle)}"

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
        self._contents[receptacle] = tuple(other for other in self._contents[receptacle] if other != thing)
        return f"You pick up the {thing} from the {receptacle}."

    def _move(self, rest: str) -> str:
        thing, _, receptacle = rest.partition(" to ")
        self._add("inreceptacle", thing, receptacle)
        self._add("objectatlocation", thing, self._here)
        self._delete("holds", self.game.agent, thing)
        self._delete("holdsany", self.game.agent)
        self._held = None
        self._left.discard((thing, receptacle))
        contents = [other for other in self._contents.get(receptacle, ()) if other != thing]
        insort(contents, thing, key=self.game.rank.__getitem__)
        self._contents[receptacle] = tuple(contents)
        return f"You move the {thing} to the {receptacle}."

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
        return self._describe_receptacle(name) if name in self.game.location else self._describe_object(name)

    def _look(self, _: str) -> str:
        return self._surroundings(())

    def _inventory(self, _: str) -> str:
        return f"You are carrying: a {self._held}." if self._held else "You are not carrying anything."

    def _help(self, _: str) -> str:
        return _HELP

    _ACTIONS = {
        "go": _go,
        "open": _open,
        "close": _close,
        "take": _take,
        "move": _move,
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

    def _surroundings(self, overview: Iterable[str]) -> str:
        """The view from here; `overview` is what is listed from a place with no receptacle."""
        receptacles = self.game.receptacles_at.get(self._here)
        if not receptacles:
            seen = _listing(f"a {receptacle}" for receptacle in overview)
            return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
        facts, location = self._facts, self.game.location
        beside = [
            (thing, receptacle)
            for thing, receptacle in self._left
            if location[receptacle] == self._here and ("objectatlocation", thing, self._here) in facts
        ]
        beside.sort(key=lambda pair: self.game.rank[pair[0]])
        seen = _listing(f"a {thing}" for thing, _ in beside)
        return f"You are facing the {_listing(receptacles)}. Next to it, you see {seen}."

    def _describe_receptacle(self, receptacle: str) -> str:
        if receptacle in self.game.openable and ("opened", receptacle) not in self._facts:
            return f"The {receptacle} is closed."
        seen = _listing(f"a {thing}" for thing in self._contents.get(receptacle, ()))
        if receptacle in self.game.openable:
            return f"The {receptacle} is open. In it, you see {seen}."
        return f"On the {receptacle}, you see {seen}."

    def _describe_object(self, thing: str) -> str:
        facts, able = self._facts, self.game.able
        if thing in able["isreceptacleobject"]:
            seen = _listing(f"a {inner}" for inner in self.game.inside.get(thing, ()))
            return f"This is a normal {thing}. In it, you see {seen}."
        sliced = ("issliced", thing) in facts
        temperature = "hot" if ("ishot", thing) in facts else "cool" if ("iscool", thing) in facts else None
        qualities = [
            quality for quality in (temperature, "clean" if ("isclean", thing) in facts else None) if quality
        ]
        if qualities:
            if qualities == ["cool"] and not sliced:
                qualities = ["cold"]
            return f"This is a {' and '.join(qualities)}{' sliced' if sliced else ''} {thing}."
        if thing in able["toggleable"] and ("istoggled", thing) in facts:
            return f"This {thing} is on."
        if thing in able["sliceable"] and sliced:
            return f"This is a sliced {thing}."
        return f"There's nothing special about {thing}."


def _listing(items: Iterable[str]) -> str:
    *others, last = list(items) or ["nothing"]
    return f"{', '.join(others)}, and {last}" if others else last


def as_game(game: Game | Mapping[str, Any] | str | os.PathLike) -> Game:
    """A parsed game from whatever names one."""
    if isinstance(game, Game):
        return game
    if isinstance(game, Mapping):
        return Game.from_dict(game)
    if isinstance(game, str | os.PathLike):
        return Game.load(game)
    raise TypeError(f"game must be a path, a game dict or a Game, not {type(game).__name__}")


class AlfWorldSplit:
    """The official games of one split: `reset(seed=s)` draws one by the seed, `reset()` the next at random.

    `options={"game": …}` plays that game instead. engine: "native" (this module) or "textworld".
    """

    def __init__(self, split: str = "train", engine: str = "native"):
        if engine == "textworld":
            from .textworld import TextWorld as player
        elif engine == "native":
            player = AlfWorld
        else:
            raise ValueError(f"unknown engine {engine!r}; known: native, textworld")
        self._player = player
        self._games = games(split)
        self._random = random.Random()
        self._env: Environment | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        options = check_options(options, {"game"})
        if seed is not None:
            self._random = random.Random(seed)
        game = options.get("game") or self._random.choice(self._games)
        if self._env is None:
            self._env = self._player(game)
        return self._env.reset(options={"game": game})

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        if self._env is None:
            raise RuntimeError("call reset before step")
        return self._env.step(command)


# From the content of a file to a Game.


def _build(data: Mapping[str, Any], name: str) -> Game:
    task, problem, walkthrough = _read_content(data)
    problem, rank = _with_text_names(problem)
    facts = defaultdict(list, problem.facts)
    _, agent, start = _only(facts["atlocation"], "(atLocation agent place)")
    _, _, held = _only(facts["holds"] or [("holds", agent, None)], "(holds agent object)")
    places = [fact[1:] for fact in facts["receptacleatlocation"]]
    if not places:
        raise GameError("its problem has no (receptacleAtLocation …): there is nowhere to go")

    can_contain: dict[str, set[str]] = defaultdict(set)
    for _, receptacle_type, object_type in facts["cancontain"]:
        can_contain[receptacle_type].add(object_type)
    receptacle_types = {receptacle: type_ for _, receptacle, type_ in facts["receptacletype"]}
    object_types = {thing: type_ for _, thing, type_ in facts["objecttype"]}
    goal = _read_goal(problem.goal)
    formula = Grounder(problem, _FLUENTS.__contains__).ground(problem.goal, {})
    return Game(
        name=name,
        task=task,
        task_type=goal.task_type if goal else "other",
        goal=goal,
        walkthrough=walkthrough,
        goal_formula=formula,
        goal_atoms=frozenset(atoms(formula)),
        facts=frozenset(fact for predicate in _FLUENTS for fact in facts[predicate]),
        agent=agent,
        start=start,
        held=held,
        rank=rank,
        type_of=object_types | receptacle_types,
        able={ability: frozenset(thing for _, thing in facts[ability]) for ability in _ABILITIES},
        openable=frozenset(receptacle for _, receptacle in facts["openable"]),
        location=dict(sorted(places, key=lambda pair: rank[pair[0]])),
        receptacles_at=_grouped(((place, receptacle) for receptacle, place in places), rank),
        contents=_grouped(((receptacle, thing) for _, thing, receptacle in facts["inreceptacle"]), rank),
        inside=_grouped(((outer, inner) for _, inner, outer in facts["inreceptacleobject"]), rank),
        accepts={receptacle: frozenset(can_contain[type_]) for receptacle, type_ in receptacle_types.items()},
    )


def _read_content(data: Mapping[str, Any]) -> tuple[str, Problem, tuple[str, ...]]:
    """The task sentence, the problem and the walkthrough of a game file, each checked."""
    if not isinstance(data, Mapping):
        raise GameError(f"it must hold a JSON object, not {type(data).__name__}")
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameError(f"it has no text under {key!r}")
    walkthrough = data.get("walkthrough") or ()
    if not isinstance(walkthrough, list | tuple) or not all(isinstance(step, str) for step in walkthrough):
        raise GameError("its walkthrough is not a list of commands")
    domain = _DOMAIN.search(data["pddl_domain"])
    if not domain or domain[1].lower() != "alfred":
        raise GameError(f"its domain is {domain[1] if domain else 'missing'}, not alfred")
    task = _TASK.search(data["grammar"])
    if not task:
        raise GameError("its grammar has no 'Your task is to: …' sentence")
    problem = read_problem(data["pddl_problem"])
    if problem.domain != "alfred":
        raise GameError(f"its problem is for the domain {problem.domain}, not alfred")
    for predicate, facts in problem.facts.items():
        for fact in facts:
            if len(fact) - 1 != _ARITY.get(predicate):
                raise GameError(f"its problem has a fact unknown to ALFWorld: ({' '.join(fact)[:80]})")
    return task[1], problem, tuple(walkthrough)


def text_names(ids: Iterable[str]) -> dict[str, str]:
    """id -> name in the text: a kind and a number; of one kind, the first id in order gets the highest."""
    mangled = sorted(id_ for id_ in ids if "_bar_" in id_)
    kinds = {id_: id_.split("_bar_", 1)[0] + "basin" * ("basin" in id_) for id_ in mangled}
    left = Counter(kinds.values())
    names = {}
    for id_, kind in kinds.items():
        names[id_] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _with_text_names(problem: Problem) -> tuple[Problem, dict[str, int]]:
    """The problem with names as in the text in place of ids, and each name's rank in the order of ids."""
    mentioned = {argument for facts in problem.facts.values() for fact in facts for argument in fact[1:]}
    if not problem.types.keys() >= mentioned:
        undeclared = min(mentioned - problem.types.keys())
        raise GameError(f"its problem uses {undeclared!r} without declaring it under :objects")
    names = text_names(mentioned)
    in_text = {id_: names.get(id_, id_) for id_ in problem.types}
    problem = problem._replace(
        types={in_text[id_]: type_ for id_, type_ in problem.types.items()},
        facts={
            predicate: [(predicate, *map(in_text.__getitem__, fact[1:])) for fact in facts]
            for predicate, facts in problem.facts.items()
        },
        goal=renamed(problem.goal, names),
    )
    return problem, {in_text[id_]: rank for rank, id_ in enumerate(sorted(mentioned))}


def _grouped(pairs: Iterable[tuple[str, str]], rank: dict[str, int]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, member in pairs:
        groups[key].append(member)
    return {key: tuple(sorted(members, key=rank.__getitem__)) for key, members in groups.items()}


def _only(facts: list[tuple[str, ...]], what: str) -> tuple[str, ...]:
    if len(facts) != 1:
        raise GameError(f"its problem has {len(facts)} facts {what} where one is needed")
    return facts[0]


def _read_goal(expression: list) -> Goal | None:
    """What the goal's atoms ask for; None if it has the shape of none of the six task types."""
    types: dict[str, str] = {}  # variable -> type
    asked: dict[str, str] = {}  # predicate -> the last variable it is asked of
    for predicate, *arguments in _atoms_in(expression):
        if predicate in ("objecttype", "receptacletype") and len(arguments) == 2:
            types[arguments[0]] = arguments[1].removesuffix("type")
        elif arguments:
            asked[predicate] = arguments[-1]
    receptacle, lamp = asked.get("inreceptacle"), asked.get("istoggled")
    objects = [type_ for variable, type_ in types.items() if variable not in (receptacle, lamp)]
    states = [state for predicate, state in _STATES.items() if predicate in asked]
    match objects, types.get(receptacle), types.get(lamp), states:
        case [thing], None, str() as lamp_type, [] if "holds" in asked:
            return Goal("look_at_obj_in_light", thing, None, 1, None, lamp_type)
        case [thing], str() as place, None, []:
            return Goal("pick_and_place_simple", thing, place, 1, None, None)
        case [thing], str() as place, None, [state]:
            return Goal(f"pick_{_VERBS[state]}_then_place_in_recep", thing, place, 1, state, None)
        case [thing, other], str() as place, None, [] if thing == other:
            return Goal("pick_two_obj_and_place", thing, place, 2, None, None)
    return None


def _atoms_in(expression: list) -> Iterator[list[str]]:
    if all(isinstance(part, str) for part in expression):
        if expression:
            yield expression
    else:
        for part in expression:
            if isinstance(part, list):
                yield from _atoms_in(part)
