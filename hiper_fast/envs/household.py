"""Seeded ALFWorld games: believable rooms, solvable by construction, each with its walkthrough and subgoals.

Rooms follow `household_data/rooms.json`: how often each receptacle and object type occurs in the official
training games, where objects lie, which receptacles open and what may contain what. Every draw comes from
`random.Random(str).random()`, which Python keeps stable, so a seed names the same game everywhere.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any

from .alfworld import TASK_TYPES, AlfWorld, Game, Goal
from .base import Info, check_options, checked_seed

SIZES = {  # size: (fewest, most) receptacles, (fewest, most) objects
    "small": ((6, 10), (6, 12)),
    "medium": ((12, 20), (12, 24)),
    "large": ((20, 40), (20, 45)),
}
TASK_SENTENCES = {
    "pick_and_place_simple": ("put some {o} on {r}.", "put a {o} in {r}."),
    "look_at_obj_in_light": ("look at {o} under the {l}.", "examine the {o} with the {l}."),
    "pick_clean_then_place_in_recep": ("clean some {o} and put it in {r}.", "put a clean {o} in {r}."),
    "pick_heat_then_place_in_recep": ("heat some {o} and put it in {r}.", "put a hot {o} in {r}."),
    "pick_cool_then_place_in_recep": ("cool some {o} and put it in {r}.", "put a cool {o} in {r}."),
    "pick_two_obj_and_place": ("put two {o} in {r}.", "find two {o} and put them in {r}."),
}


@dataclass(frozen=True)
class Change:
    """How an object gets into a state: the command's verb, the appliance, and the two predicates."""

    verb: str
    appliance: str
    able: str
    done: str


CHANGES = {
    "clean": Change("clean", "SinkBasin", "cleanable", "isClean"),
    "hot": Change("heat", "Microwave", "heatable", "isHot"),
    "cool": Change("cool", "Fridge", "coolable", "isCool"),
}
_STATE_OF_TASK = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
_LAMP = "DeskLamp"
_KNIVES = {"ButterKnife", "Knife"}
_SHARED_PLACE = 0.25  # how often a receptacle stands at the place of the previous one of its type

_DATA = files("hiper_fast.envs") / "household_data"
_DOMAIN = (_DATA / "domain.pddl").read_text(encoding="utf-8")
_GRAMMAR = (_DATA / "grammar.twl2").read_text(encoding="utf-8")
_STATISTICS = json.loads((_DATA / "rooms.json").read_text(encoding="utf-8"))
_ROOMS, _RECEPTACLES, _ABILITIES = (_STATISTICS[key] for key in ("rooms", "receptacles", "objects"))
_COORDINATES = [
    f"_bar__{'minus' if c < 0 else 'plus'}_{abs(c) // 100:02}_dot_{abs(c) % 100:02}" for c in range(-499, 500)
]


def subgoal_phrases(goal: Goal) -> dict[str, str]:
    """The subgoal of every phase of `goal`, in the order they are pursued.

    Keys: `find`, `take`, then `clean`, `heat` or `cool` for a changed state, then `put`, or `use` under a
    lamp; for two objects also `find second`, `take second`, `put second`. A phrase depends on the goal
    alone: `{"find": "find apple", "take": "take apple", "heat": "heat apple", "put": "put apple in fridge"}`.
    """
    thing = goal.object_type
    phrases = {"find": f"find {thing}", "take": f"take {thing}"}
    if goal.lamp_type is not None:
        return phrases | {"use": f"use {goal.lamp_type}"}
    if goal.state is not None:
        verb = CHANGES[goal.state].verb
        phrases[verb] = f"{verb} {thing}"
    phrases["put"] = f"put {thing} in {goal.receptacle_type}"
    if goal.count == 2:
        phrases["find second"] = f"find second {thing}"
        phrases["take second"] = f"take second {thing}"
        phrases["put second"] = f"put second {thing} in {goal.receptacle_type}"
    return phrases


def generate(task_type: str, seed: int, size: str = "small") -> dict:
    """Make game `seed` of a task type and size: a dict as in an official `game.tw-pddl` file.

    Keys: `pddl_domain`, `grammar`, `pddl_problem`, `solvable` (True), `walkthrough` (list of commands that
    win), `subgoals` (one phrase of `subgoal_phrases` per command), `task_type`, `seed`, `size`. The start
    never satisfies the goal. The same arguments give the same game in every process.

    Raises ValueError for a task type outside `TASK_TYPES`, a size outside `SIZES` or a seed that is no
    integer of at least 0.
    """
    if task_type not in TASK_SENTENCES:
        raise ValueError(f"task_type is {task_type!r}; choose one of {', '.join(TASK_TYPES)}")
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    seed = checked_seed(seed)
    rng = random.Random(f"{task_type} {size} {seed}")
    plan = _draw_plan(rng, task_type)
    scene = _draw_scene(rng, plan, size)
    goal = plan.goal()
    sentence = _pick(rng, TASK_SENTENCES[task_type]).format(
        o=goal.object_type, r=goal.receptacle_type, l=goal.lamp_type
    )
    walkthrough, subgoals = _solve(rng, plan, scene)
    return {
        "pddl_domain": _DOMAIN,
        "grammar": _GRAMMAR.replace("<task>", sentence),
        "pddl_problem": _problem_text(f"household-{task_type}-{size}-{seed}", plan, scene),
        "solvable": True,
        "walkthrough": walkthrough,
        "subgoals": subgoals,
        "task_type": task_type,
        "seed": seed,
        "size": size,
    }


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)


def _pick(rng: random.Random, options: Sequence):
    return options[_below(rng, len(options))]


def _pick_weighted(rng: random.Random, weights: dict[str, float]) -> str:
    keys, ends = list(weights), list(accumulate(weights.values()))
    return keys[min(bisect_right(ends, rng.random() * ends[-1]), len(keys) - 1)]


@dataclass(frozen=True)
class _Plan:
    """What is asked for, in type names of the PDDL ("SinkBasin"), and in which room."""

    task_type: str
    room: str
    object: str
    receptacle: str | None

    @property
    def state(self) -> str | None:
        return _STATE_OF_TASK.get(self.task_type)

    @property
    def count(self) -> int:
        return 2 if self.task_type == "pick_two_obj_and_place" else 1

    @property
    def lamp(self) -> str | None:
        return _LAMP if self.receptacle is None else None

    @property
    def barred(self) -> str | None:
        """The receptacle type where no target may lie, lest the start satisfy (part of) the goal."""
        return None if self.state else self.receptacle

    def goal(self) -> Goal:
        return Goal(
            task_type=self.task_type,
            object_type=self.object.lower(),
            receptacle_type=self.receptacle and self.receptacle.lower(),
            count=self.count,
            state=self.state,
            lamp_type=self.lamp and self.lamp.lower(),
        )


@cache
def _targets(task_type: str, room: str) -> dict[str, dict[str, float]]:
    """Object types a task may ask for in a room -> receptacle types they may go to, with their shares."""
    change = CHANGES.get(_STATE_OF_TASK.get(task_type, ""))
    receptacles, targets = _ROOMS[room]["receptacles"], {}
    for kind, facts in _ROOMS[room]["objects"].items():
        if not {"pickupable", change.able if change else "pickupable"} <= set(_ABILITIES[kind]):
            continue
        ends = {
            end: row["share"]
            for end, row in receptacles.items()
            if kind in _RECEPTACLES[end]["contains"]
            and end != (change and change.appliance)
            and (change or facts["where"].keys() - {end})
        }
        if ends:
            targets[kind] = ends
    return targets


def _draw_plan(rng: random.Random, task_type: str) -> _Plan:
    room = _pick_weighted(rng, {name: facts["tasks"].get(task_type, 0) for name, facts in _ROOMS.items()})
    targets = _targets(task_type, room)
    kind = _pick_weighted(rng, {kind: _ROOMS[room]["objects"][kind]["share"] for kind in targets})
    lit = task_type == "look_at_obj_in_light"
    return _Plan(task_type, room, kind, None if lit else _pick_weighted(rng, targets[kind]))


@dataclass(slots=True)
class _Receptacle:
    kind: str
    id: str
    location: str
    openable: bool
    name: str = ""


@dataclass(slots=True)
class _Thing:
    kind: str
    id: str
    home: _Receptacle
    name: str = ""


@dataclass(slots=True)
class _Scene:
    receptacles: list[_Receptacle]
    things: list[_Thing]


def _draw_scene(rng: random.Random, plan: _Plan, size: str) -> _Scene:
    """Place what the plan needs first, then fill the room by its statistics."""
    (fewest, most), (fewest_things, most_things) = SIZES[size]
    objects = _ROOMS[plan.room]["objects"]

    def homes(kind: str) -> dict[str, float]:
        return {
            home: weight
            for home, weight in objects[kind]["where"].items()
            if kind != plan.object or home != plan.barred
        }

    kinds = [plan.object] * plan.count + ([plan.lamp] if plan.lamp else [])
    needed = [(kind, _pick_weighted(rng, homes(kind))) for kind in kinds]
    required = [home for _, home in needed]
    if plan.receptacle:
        required.append(plan.receptacle)
    if plan.state:
        required.append(CHANGES[plan.state].appliance)
    receptacles = _draw_receptacles(rng, plan.room, required, fewest + _below(rng, most - fewest + 1))

    standing: dict[str, list[_Receptacle]] = {}
    for receptacle in receptacles:
        standing.setdefault(receptacle.kind, []).append(receptacle)
    places = {
        kind: options
        for kind in objects
        if (options := {home: weight for home, weight in homes(kind).items() if home in standing})
    }
    room_for = {kind: objects[kind]["max"] for kind in places}
    for kind, _ in needed:
        room_for[kind] -= 1
    total = fewest_things + _below(rng, most_things - fewest_things + 1)
    while len(needed) < total:
        open_kinds = [kind for kind in places if room_for[kind] > 0]
        if not open_kinds:
            break
        kind = _pick_weighted(rng, {k: objects[k]["share"] * objects[k]["mean"] for k in open_kinds})
        room_for[kind] -= 1
        needed.append((kind, _pick_weighted(rng, places[kind])))

    taken = {receptacle.id for receptacle in receptacles}
    things = [_Thing(kind, _draw_id(rng, kind, taken), _pick(rng, standing[home])) for kind, home in needed]
    _number(receptacles)
    _number(things)
    return _Scene(receptacles, things)


def _draw_receptacles(rng: random.Random, room: str, required: list[str], total: int) -> list[_Receptacle]:
    """Draw `total` receptacles: the required types, others by their share, then more of the same."""
    usual = _ROOMS[room]["receptacles"]
    counts = dict.fromkeys(required, 1)
    others = [kind for kind in usual if kind not in counts]
    others.sort(key=lambda kind: rng.random())
    for kind in others:
        if len(counts) < 0.7 * total and rng.random() < usual[kind]["share"]:
            counts[kind] = 1
    while sum(counts.values()) < total:
        more = {kind: usual[kind]["mean"] for kind in counts if counts[kind] < usual[kind]["max"]}
        more = more or {kind: row["share"] for kind, row in usual.items() if kind not in counts}
        if not more:
            break
        kind = _pick_weighted(rng, more)
        counts[kind] = counts.get(kind, 0) + 1

    receptacles: list[_Receptacle] = []
    taken: set[str] = set()
    for kind, count in counts.items():
        for index in range(count):
            shared = index > 0 and rng.random() < _SHARED_PLACE
            location = receptacles[-1].location if shared else f"loc_bar_{len(receptacles) + 1}"
            openable = rng.random() < _RECEPTACLES[kind]["openable"]
            receptacles.append(_Receptacle(kind, _draw_id(rng, kind, taken), location, openable))
    return receptacles


def _draw_id(rng: random.Random, kind: str, taken: set[str]) -> str:
    """`<Type>_bar_<x>_bar_<y>_bar_<z>`; a basin's id names it as a part of its sink or bathtub."""
    stem, suffix = (kind[: -len("Basin")], f"_bar_{kind}") if kind.endswith("Basin") else (kind, "")
    while True:
        x, y, z = (_pick(rng, _COORDINATES) for _ in range(3))
        identity = f"{stem}{x}{y}{z}{suffix}"
        if identity not in taken:
            taken.add(identity)
            return identity


def _number(entities: Sequence[_Receptacle | _Thing]) -> None:
    """Name everything as the game will: per type, the first id in lower case gets the highest number."""
    seen: dict[str, int] = {}
    for entity in sorted(entities, key=lambda entity: entity.id.lower(), reverse=True):
        seen[entity.kind] = seen.get(entity.kind, 0) + 1
        entity.name = f"{entity.kind.lower()} {seen[entity.kind]}"


def _solve(rng: random.Random, plan: _Plan, scene: _Scene) -> tuple[list[str], list[str]]:
    """The commands that win, walked step by step, and the subgoal each of them serves."""
    phrases = subgoal_phrases(plan.goal())
    commands: list[str] = []
    subgoals: list[str] = []
    opened: set[str] = set()
    here = None

    def do(command: str, phase: str) -> None:
        commands.append(command)
        subgoals.append(phrases[phase])

    def visit(receptacle: _Receptacle, phase: str, open_it: bool = False) -> None:
        nonlocal here
        if receptacle.location != here:
            here = receptacle.location
            do(f"go to {receptacle.name}", phase)
        if open_it and receptacle.openable and receptacle.name not in opened:
            opened.add(receptacle.name)
            do(f"open {receptacle.name}", phase)

    def any_of(kind: str) -> _Receptacle:
        return _pick(rng, [receptacle for receptacle in scene.receptacles if receptacle.kind == kind])

    end = any_of(plan.receptacle) if plan.receptacle else None
    for thing, nth in zip(scene.things[: plan.count], ("", " second"), strict=False):
        visit(thing.home, f"find{nth}", open_it=True)
        do(f"take {thing.name} from {thing.home.name}", f"take{nth}")
        if plan.state:
            change, appliance = CHANGES[plan.state], any_of(CHANGES[plan.state].appliance)
            visit(appliance, change.verb)
            do(f"{change.verb} {thing.name} with {appliance.name}", change.verb)
        if end:
            visit(end, f"put{nth}", open_it=True)
            do(f"move {thing.name} to {end.name}", f"put{nth}")
    if plan.lamp:
        lamp = next(thing for thing in scene.things if thing.kind == plan.lamp)
        visit(lamp.home, "use")
        do(f"use {lamp.name}", "use")
    return commands, subgoals


def _problem_text(name: str, plan: _Plan, scene: _Scene) -> str:
    """The PDDL problem, with the types and canContain pairs of this room and the types the domain names."""
    kinds = sorted({thing.kind for thing in scene.things} | _KNIVES)
    appliances = {change.appliance for change in CHANGES.values()}
    ends = sorted({receptacle.kind for receptacle in scene.receptacles} | appliances)
    start = "loc_bar_0"
    locations = dict.fromkeys([start, *(receptacle.location for receptacle in scene.receptacles)])
    declared = ["agent1 - agent"]
    declared += [f"{location} - location" for location in locations]
    declared += [f"{receptacle.id} - receptacle" for receptacle in scene.receptacles]
    declared += [f"{thing.id} - object" for thing in scene.things]
    declared += [f"{kind}Type - otype" for kind in kinds]
    declared += [f"{end}Type - rtype" for end in ends]

    facts = [f"(atLocation agent1 {start})"]
    for receptacle in scene.receptacles:
        facts.append(f"(receptacleType {receptacle.id} {receptacle.kind}Type)")
        facts.append(f"(receptacleAtLocation {receptacle.id} {receptacle.location})")
        if receptacle.openable:
            facts.append(f"(openable {receptacle.id})")
    for thing in scene.things:
        facts.append(f"(objectType {thing.id} {thing.kind}Type)")
        facts.append(f"(inReceptacle {thing.id} {thing.home.id})")
        facts.append(f"(objectAtLocation {thing.id} {thing.home.location})")
        facts += [f"({ability} {thing.id})" for ability in _ABILITIES[thing.kind]]
    for end in ends:
        holds = _RECEPTACLES[end]["contains"]
        facts += [f"(canContain {end}Type {kind}Type)" for kind in kinds if kind in holds]

    objects, init = "\n    ".join(declared), "\n    ".join(facts)
    return (
        f"(define (problem {name})\n  (:domain alfred)\n  (:objects\n    {objects})\n"
        f"  (:init\n    {init})\n  (:goal {_goal_text(plan)}))\n"
    )


def _goal_text(plan: _Plan) -> str:
    """The goal of a task type, in the shape of the official problems."""
    if plan.lamp:
        return (
            "(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and"
            f" (objectType ?ot {plan.lamp}Type) (toggleable ?ot) (isToggled ?ot)"
            " (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
            f" (exists (?o - object ?a - agent) (and (objectType ?o {plan.object}Type) (holds ?a ?o))))"
        )

    def lies(variable: str) -> str:
        return (
            f"(objectType {variable} {plan.object}Type) (receptacleType ?r {plan.receptacle}Type)"
            f" (inReceptacle {variable} ?r)"
        )

    if plan.count == 2:
        second = f"(exists (?o2 - object) (and (not (= ?o1 ?o2)) {lies('?o2')}))"
        return f"(and (exists (?r - receptacle) (exists (?o1 - object) (and {lies('?o1')} {second}))))"
    changed = ""
    if plan.state:
        change = CHANGES[plan.state]
        changed = f"({change.able} ?o) ({change.done} ?o) "
    return f"(and (exists (?r - receptacle) (exists (?o - object) (and {changed}{lies('?o')}))))"


class Household:
    """Generated games without end: `reset(seed=s)` starts game `s`, its task type drawn from `s` too.

    `task_types` limits the draw (None: all six); `engine` is "native" or "textworld" (the optional
    package). `reset()` without a seed starts a game nobody chose. Observations, rewards and `info` are
    those of `AlfWorld`; `game` is the parsed game being played, `content` its dict, with walkthrough and subgoals.
    """

    def __init__(self, size: str = "small", task_types: Sequence[str] | None = None, engine: str = "native"):
        self.size = size
        self.task_types = TASK_TYPES if task_types is None else tuple(task_types)
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
        if not self.task_types or not set(self.task_types) <= set(TASK_TYPES):
            raise ValueError(f"task_types is {task_types!r}; choose from {', '.join(TASK_TYPES)}")
        self.engine = _engine(engine)
        self.content: dict | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        """Start game `seed` and return its text and info."""
        check_options(options, set())
        seed = random.SystemRandom().randrange(2**31) if seed is None else checked_seed(seed)
        task_type = _pick(random.Random(f"household {self.size} {seed}"), self.task_types)
        self.content = generate(task_type, seed, self.size)
        self._play = self.engine(self.content)
        return self._play.reset()

    @property
    def game(self) -> Game:
        return self._play.game

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        """Play one command: observation, reward (10 on winning), terminated, truncated, info."""
        if self.content is None:
            raise RuntimeError("step() before reset(): call reset() to start a game")
        return self._play.step(command)


def _engine(name: str) -> type:
    if name == "native":
        return AlfWorld
    if name == "textworld":
        from .textworld import TextWorld

        return TextWorld
    raise ValueError(f"engine is {name!r}; choose native or textworld")


def vocabulary() -> list[str]:
    """Every word, sorted, that the text, commands, tasks and subgoals of official games may hold.

    Words as they are written ("You", "you"), without numbers and punctuation: the names of all object and
    receptacle types in lower case, and the words of the grammar, of the task sentences and of the subgoals.
    """
    names = {kind.lower() for kind in (*_ABILITIES, *_RECEPTACLES)}
    spoken = re.findall(r'(?:"rhs":|(?:template|feedback) ::) "((?:[^"\\]|\\.)*)"', _GRAMMAR)
    spoken = re.sub(r"\[.*?\]|\{.*?\}|#.*?#|<.*?>|\\n", " ", " ".join(spoken))
    sentences = re.sub(r"\{.\}", " ", " ".join(sum(TASK_SENTENCES.values(), ())))
    words = re.findall(
        r"[A-Za-z']+", f"{spoken} {sentences} Nothing happens find second take clean heat cool use put in"
    )
    return sorted(names | set(words))
