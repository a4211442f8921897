"""Believable rooms: what is asked for, where things stand, drawn by the official games' statistics.

`data/rooms.json` says how often each receptacle and object type occurs in the official training
games, where objects lie, which receptacles open and what may contain what. Every draw comes from
`random.Random(str).random()`, which Python keeps stable.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate

from ..alfworld.game import Goal
from ..alfworld.subgoals import CHANGES

SIZES = {  # size: (fewest, most) receptacles, (fewest, most) objects
    "small": ((6, 10), (6, 12)),
    "medium": ((12, 20), (12, 24)),
    "large": ((20, 40), (20, 45)),
}
_STATE_OF_TASK = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
_LAMP = "DeskLamp"
_SHARED_PLACE = 0.25  # how often a receptacle stands at the place of the previous one of its type
_VARIETY = 0.7  # at most so much of a room is one receptacle of a type each

DATA = files("hiper_fast.envs.household") / "data"
_STATISTICS = json.loads((DATA / "rooms.json").read_text(encoding="utf-8"))
_ROOMS, RECEPTACLES, ABILITIES = (_STATISTICS[key] for key in ("rooms", "receptacles", "objects"))
_COORDINATES = [
    f"_bar__{'minus' if x < 0 else 'plus'}_{abs(x) // 100:02}_dot_{abs(x) % 100:02}"
    for x in range(-499, 500)  # hundredths
]


def _draw_below(rng: random.Random, end: int) -> int:
    return int(rng.random() * end)


def pick(rng: random.Random, options: Sequence):
    return options[_draw_below(rng, len(options))]


def _pick_weighted(rng: random.Random, weights: dict[str, float]) -> str:
    keys, ends = list(weights), list(accumulate(weights.values()))
    return keys[min(bisect_right(ends, rng.random() * ends[-1]), len(keys) - 1)]


@dataclass(frozen=True)
class Plan:
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
        """The receptacle type where no target may lie, lest the start satisfy part of the goal."""
        return None if self.state else self.receptacle

    def make_goal(self) -> Goal:
        return Goal(
            task_type=self.task_type,
            object_type=self.object.lower(),
            receptacle_type=self.receptacle and self.receptacle.lower(),
            count=self.count,
            state=self.state,
            lamp_type=self.lamp and self.lamp.lower(),
        )


@cache
def _find_targets(task_type: str, room: str) -> dict[str, dict[str, float]]:
    """What a task may ask for in a room -> where it may go; types, with shares."""
    change = CHANGES.get(_STATE_OF_TASK.get(task_type, ""))
    receptacles, targets = _ROOMS[room]["receptacles"], {}
    for kind, facts in _ROOMS[room]["objects"].items():
        if not {"pickupable", change.able if change else "pickupable"} <= set(ABILITIES[kind]):
            continue
        ends = {
            end: row["share"]
            for end, row in receptacles.items()
            if kind in RECEPTACLES[end]["contains"]
            and end != (change and change.appliance)
            and (change or facts["where"].keys() - {end})
        }
        if ends:
            targets[kind] = ends
    return targets


def draw_plan(rng: random.Random, task_type: str) -> Plan:
    room = _pick_weighted(
        rng, {name: facts["tasks"].get(task_type, 0) for name, facts in _ROOMS.items()}
    )
    targets = _find_targets(task_type, room)
    kind = _pick_weighted(rng, {kind: _ROOMS[room]["objects"][kind]["share"] for kind in targets})
    lit = task_type == "look_at_obj_in_light"
    return Plan(task_type, room, kind, None if lit else _pick_weighted(rng, targets[kind]))


@dataclass(slots=True)
class Receptacle:
    kind: str
    id: str
    location: str
    openable: bool
    name: str = ""


@dataclass(slots=True)
class Thing:
    kind: str
    id: str
    home: Receptacle
    name: str = ""


@dataclass(slots=True)
class Scene:
    receptacles: list[Receptacle]
    things: list[Thing]


def draw_scene(rng: random.Random, plan: Plan, size: str) -> Scene:
    """Place what the plan needs first, then fill the room by its statistics."""
    (fewest, most), (fewest_things, most_things) = SIZES[size]
    objects = _ROOMS[plan.room]["objects"]

    def find_homes(kind: str) -> dict[str, float]:
        return {
            home: weight
            for home, weight in objects[kind]["where"].items()
            if kind != plan.object or home != plan.barred
        }

    kinds = [plan.object] * plan.count + ([plan.lamp] if plan.lamp else [])
    needed = [(kind, _pick_weighted(rng, find_homes(kind))) for kind in kinds]
    required = [home for _, home in needed]
    if plan.receptacle:
        required.append(plan.receptacle)
    if plan.state:
        required.append(CHANGES[plan.state].appliance)
    receptacles = _draw_receptacles(
        rng, plan.room, required, fewest + _draw_below(rng, most - fewest + 1)
    )

    standing: dict[str, list[Receptacle]] = {}
    for receptacle in receptacles:
        standing.setdefault(receptacle.kind, []).append(receptacle)
    places = {}
    for kind in objects:
        options = {home: weight for home, weight in find_homes(kind).items() if home in standing}
        if options:
            places[kind] = options
    room_for = {kind: objects[kind]["max"] for kind in places}
    for kind, _ in needed:
        room_for[kind] -= 1
    total = fewest_things + _draw_below(rng, most_things - fewest_things + 1)
    while len(needed) < total:
        open_kinds = [kind for kind in places if room_for[kind] > 0]
        if not open_kinds:
            break
        kind = _pick_weighted(
            rng, {k: objects[k]["share"] * objects[k]["mean"] for k in open_kinds}
        )
        room_for[kind] -= 1
        needed.append((kind, _pick_weighted(rng, places[kind])))

    taken = {receptacle.id for receptacle in receptacles}
    things = [
        Thing(kind, _draw_id(rng, kind, taken), pick(rng, standing[home])) for kind, home in needed
    ]
    _give_names(receptacles)
    _give_names(things)
    return Scene(receptacles, things)


def _draw_receptacles(
    rng: random.Random, room: str, required: list[str], total: int
) -> list[Receptacle]:
    """Draw `total`: the required types, others by their share, then more of the same."""
    usual = _ROOMS[room]["receptacles"]
    counts = dict.fromkeys(required, 1)
    others = [kind for kind in usual if kind not in counts]
    others.sort(key=lambda kind: rng.random())
    for kind in others:
        if len(counts) < _VARIETY * total and rng.random() < usual[kind]["share"]:
            counts[kind] = 1
    while sum(counts.values()) < total:
        more = {kind: usual[kind]["mean"] for kind in counts if counts[kind] < usual[kind]["max"]}
        more = more or {kind: row["share"] for kind, row in usual.items() if kind not in counts}
        if not more:
            break
        kind = _pick_weighted(rng, more)
        counts[kind] = counts.get(kind, 0) + 1

    receptacles: list[Receptacle] = []
    taken: set[str] = set()
    for kind, count in counts.items():
        for index in range(count):
            shared = index > 0 and rng.random() < _SHARED_PLACE
            location = receptacles[-1].location if shared else f"loc_bar_{len(receptacles) + 1}"
            openable = rng.random() < RECEPTACLES[kind]["openable"]
            receptacles.append(Receptacle(kind, _draw_id(rng, kind, taken), location, openable))
    return receptacles


def _draw_id(rng: random.Random, kind: str, taken: set[str]) -> str:
    """`<Type>_bar_<x>_bar_<y>_bar_<z>`; a basin's id names it as a part of its sink or bathtub."""
    stem, suffix = (kind[: -len("Basin")], f"_bar_{kind}") if kind.endswith("Basin") else (kind, "")
    while True:
        place = "".join(pick(rng, _COORDINATES) for _ in range(3))
        identity = f"{stem}{place}{suffix}"
        if identity not in taken:
            taken.add(identity)
            return identity


def _give_names(entities: Sequence[Receptacle | Thing]) -> None:
    """As the game will: per type, the first id in lower case gets the highest number."""
    seen: dict[str, int] = {}
    for entity in sorted(entities, key=lambda entity: entity.id.lower(), reverse=True):
        seen[entity.kind] = seen.get(entity.kind, 0) + 1
        entity.name = f"{entity.kind.lower()} {seen[entity.kind]}"
