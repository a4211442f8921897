"""A game of ALFWorld, parsed once from its `game.tw-pddl` file and shared by environments."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from hiper_fast.text import strip_controls

from ..base import GameError
from .dialect import Dialect, read_dialect
from .pddl import Fact, Formula, Grounder, Problem, list_atoms, read_problem, rename

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

GAME_FILE = "game.tw-pddl"
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
    | dict.fromkeys(("openable", "moveable", "full", "isreceptacleobjectfull"), 1)
    | dict.fromkeys(("receptacleatlocation", "receptacletype", "objecttype", "cancontain"), 2)
    | dict.fromkeys(("inreceptacleobject", "wasinreceptacle"), 2)
)

_DOMAIN = re.compile(r"\(\s*define\s*\(\s*domain\s+([^\s()]+)", re.IGNORECASE)
_TASK = re.compile(r"Your task is to: ([^\"\n]*)")


@dataclass(frozen=True, slots=True)
class Goal:
    """What a game asks for. Type names are lower-case, as in the text ("soapbar")."""

    task_type: str
    object_type: str
    receptacle_type: str | None  # None for look_at_obj_in_light
    count: int  # how many objects must lie there
    state: str | None  # None, "clean", "hot" or "cool"
    lamp_type: str | None  # only for look_at_obj_in_light


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """One game. Objects, receptacles and the agent go by their names in the text."""

    name: str
    task: str
    task_type: str  # "other" where goal is None
    goal: Goal | None  # None for a goal outside the six task types
    walkthrough: tuple[str, ...]
    dialect: Dialect  # how its commands are worded
    goal_formula: Formula = field(repr=False)
    goal_atoms: frozenset[Fact] = field(repr=False)
    facts: frozenset[Fact] = field(repr=False)  # the fluents that hold at the start
    agent: str = field(repr=False)
    start: str = field(repr=False)  # the agent's first location
    held: str | None = field(repr=False)
    rank: dict[str, int] = field(
        repr=False
    )  # name -> place in the order of ids, which listings follow
    type_of: dict[str, str] = field(repr=False)  # object or receptacle -> its PDDL type
    able: dict[str, frozenset[str]] = field(repr=False)  # ability -> the objects that have it
    openable: frozenset[str] = field(repr=False)
    location: dict[str, str] = field(repr=False)  # receptacle -> location, in id order
    receptacles_at: dict[str, tuple[str, ...]] = field(repr=False)
    contents: dict[str, tuple[str, ...]] = field(
        repr=False
    )  # receptacle -> its objects at the start
    inside: dict[str, tuple[str, ...]] = field(
        repr=False
    )  # movable receptacle -> what it is said to hold
    accepts: dict[str, frozenset[str]] = field(
        repr=False
    )  # receptacle -> object types it can contain

    @classmethod
    def load(cls, path: str | os.PathLike) -> Game:
        """Parse a `game.tw-pddl` file, or the one in a folder. Raises GameError (a ValueError)."""
        path = find_game_file(path)
        return cls.from_dict(read_game(path), name=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "game") -> Game:
        """From the content of a game file. Raises GameError naming `name` and what is wrong."""
        try:
            return _build(data, name)
        except GameError as error:
            raise GameError(f"cannot play {name}: {error}") from None


def find_game_file(path: str | os.PathLike) -> Path:
    """The game file that a path names: itself, or the `game.tw-pddl` in it if it is a folder."""
    path = Path(path)
    return path / GAME_FILE if path.is_dir() else path


def read_game(path: Path) -> dict[str, Any]:
    """The content of a game file. Raises GameError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise GameError(f"cannot play {path}: it is larger than {MAX_FILE_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise GameError(f"cannot read {path}: {error.strerror}") from error
    except GameError:
        raise
    except (ValueError, RecursionError) as error:
        raise GameError(
            f"cannot play {path}: it is not valid JSON ({error}); is it truncated?"
        ) from None
    if not isinstance(content, dict):
        raise GameError(
            f"cannot play {path}: it must hold a JSON object, not {type(content).__name__}"
        )
    return content


def parse_game(game: Game | Mapping[str, Any] | str | os.PathLike) -> Game:
    """A parsed game from whatever names one."""
    if isinstance(game, Game):
        return game
    if isinstance(game, Mapping):
        return Game.from_dict(game)
    if isinstance(game, str | os.PathLike):
        return Game.load(game)
    raise TypeError(f"game must be a path, a game dict or a Game, not {type(game).__name__}")


# From the content of a file to a Game.


def _build(data: Mapping[str, Any], name: str) -> Game:
    task, problem, walkthrough = _read_content(data)
    problem, rank = _give_text_names(problem)
    facts = defaultdict(list, problem.facts)
    _, agent, start = _take_only(facts["atlocation"], "(atLocation agent place)")
    if problem.types[agent] != "agent":
        raise GameError(
            f"its problem has {agent!r} where an agent is needed: (atLocation agent place)"
        )
    _, _, held = _take_only(facts["holds"] or [("holds", agent, None)], "(holds agent object)")
    places = [fact[1:] for fact in facts["receptacleatlocation"]]
    if not places:
        raise GameError("its problem has no (receptacleAtLocation …): there is nowhere to go")
    if len(dict(places)) < len(places):
        raise GameError("its problem has a receptacle at two locations")

    can_contain: dict[str, set[str]] = defaultdict(set)
    for _, receptacle_type, object_type in facts["cancontain"]:
        can_contain[receptacle_type].add(object_type)
    receptacle_types = {receptacle: type_ for _, receptacle, type_ in facts["receptacletype"]}
    object_types = {thing: type_ for _, thing, type_ in facts["objecttype"]}
    goal = _read_goal(problem.goal)
    formula = Grounder(problem, _FLUENTS, _ARITY).ground(problem.goal, {})
    return Game(
        name=name,
        task=task,
        task_type=goal.task_type if goal else "other",
        goal=goal,
        walkthrough=walkthrough,
        dialect=read_dialect(_TASK.sub("", data["grammar"])),
        goal_formula=formula,
        goal_atoms=frozenset(list_atoms(formula)),
        facts=frozenset(fact for predicate in _FLUENTS for fact in facts[predicate]),
        agent=agent,
        start=start,
        held=held,
        rank=rank,
        type_of=object_types | receptacle_types,
        able={ability: frozenset(map(itemgetter(1), facts[ability])) for ability in _ABILITIES},
        openable=frozenset(receptacle for _, receptacle in facts["openable"]),
        location=dict(sorted(places, key=lambda pair: rank[pair[0]])),
        receptacles_at=_group(((place, receptacle) for receptacle, place in places), rank),
        contents=_group(
            ((receptacle, thing) for _, thing, receptacle in facts["inreceptacle"]), rank
        ),
        inside=_group(((outer, inner) for _, inner, outer in facts["inreceptacleobject"]), rank),
        accepts={
            receptacle: frozenset(can_contain[type_])
            for receptacle, type_ in receptacle_types.items()
        },
    )


def _read_content(data: Mapping[str, Any]) -> tuple[str, Problem, tuple[str, ...]]:
    """The task sentence, the problem and the walkthrough of a game file, each checked."""
    if not isinstance(data, Mapping):
        raise GameError(f"it must hold a JSON object, not {type(data).__name__}")
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameError(f"it has no text under {key!r}")
    walkthrough = data.get("walkthrough") or ()
    if not isinstance(walkthrough, list | tuple) or not all(
        isinstance(step, str) for step in walkthrough
    ):
        raise GameError("its walkthrough is not a list of commands")
    domain = _DOMAIN.search(data["pddl_domain"])
    if not domain or domain[1].lower() != "alfred":
        raise GameError(f"its domain is {domain[1] if domain else 'missing'}, not alfred")
    task = _TASK.search(data["grammar"])
    if not task:
        raise GameError("its grammar has no 'Your task is to: …' sentence")
    problem = read_problem(strip_controls(data["pddl_problem"]))
    if problem.domain != "alfred":
        raise GameError(f"its problem is for the domain {problem.domain}, not alfred")
    for predicate, facts in problem.facts.items():
        for fact in facts:
            if len(fact) - 1 != _ARITY.get(predicate):
                raise GameError(
                    f"its problem has a fact unknown to ALFWorld: ({' '.join(fact)[:80]})"
                )
    return strip_controls(task[1]), problem, tuple(map(strip_controls, walkthrough))


def make_text_names(ids: Iterable[str]) -> dict[str, str]:
    """id -> name in the text: a kind and a number; the first id in order gets the highest."""
    mangled = sorted(id_ for id_ in ids if "_bar_" in id_)
    kinds = {id_: id_.split("_bar_", 1)[0] + "basin" * ("basin" in id_) for id_ in mangled}
    left = Counter(kinds.values())
    names = {}
    for id_, kind in kinds.items():
        names[id_] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _give_text_names(problem: Problem) -> tuple[Problem, dict[str, int]]:
    """The problem with text names in place of ids, and each name's rank in the order of ids."""
    facts = chain.from_iterable(problem.facts.values())
    mentioned = {argument for fact in facts for argument in fact[1:]}
    if not problem.types.keys() >= mentioned:
        undeclared = min(mentioned - problem.types.keys())
        raise GameError(f"its problem uses {undeclared!r} without declaring it under :objects")
    names = make_text_names(mentioned)
    in_text = {id_: names.get(id_, id_) for id_ in problem.types}

    def rename_all(predicate: str, facts: list[Fact]) -> list[Fact]:
        return [(predicate, *map(in_text.__getitem__, fact[1:])) for fact in facts]

    problem = problem._replace(
        types={in_text[id_]: type_ for id_, type_ in problem.types.items()},
        facts={name: rename_all(name, facts) for name, facts in problem.facts.items()},
        goal=rename(problem.goal, names),
    )
    return problem, {in_text[id_]: rank for rank, id_ in enumerate(sorted(mentioned))}


def _group(pairs: Iterable[tuple[str, str]], rank: dict[str, int]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, member in pairs:
        groups[key].append(member)
    return {key: tuple(sorted(members, key=rank.__getitem__)) for key, members in groups.items()}


def _take_only(facts: list[tuple[str, ...]], what: str) -> tuple[str, ...]:
    if len(facts) != 1:
        raise GameError(f"its problem has {len(facts)} facts {what} where one is needed")
    return facts[0]


def _read_goal(expression: list) -> Goal | None:
    """What the goal's atoms ask for; None if it has the shape of none of the six task types."""
    types: dict[str, str] = {}  # variable -> type
    asked: dict[str, str] = {}  # predicate -> the last variable it is asked of
    for predicate, *arguments in _walk_atoms(expression):
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


def _walk_atoms(expression: list) -> Iterator[list[str]]:
    if all(isinstance(part, str) for part in expression):
        if expression:
            yield expression
    else:
        for part in expression:
            if isinstance(part, list):
                yield from _walk_atoms(part)
