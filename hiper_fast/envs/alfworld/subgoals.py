"""The subgoals of a goal, and how an object gets into the state that it asks for."""

from __future__ import annotations

from dataclasses import dataclass

from .game import Goal


@dataclass(frozen=True)
class Change:
    """How an object gets into a state: the command's verb, the appliance, two predicates."""

    verb: str
    appliance: str
    able: str
    done: str


CHANGES = {
    "clean": Change("clean", "SinkBasin", "cleanable", "isClean"),
    "hot": Change("heat", "Microwave", "heatable", "isHot"),
    "cool": Change("cool", "Fridge", "coolable", "isCool"),
}


def subgoal_phrases(goal: Goal) -> dict[str, str]:
    """The subgoal of every phase of `goal`, in the order they are pursued.

    Keys: `find`, `take`, then `clean`, `heat` or `cool` for a changed state, then `put`, or `use`
    under a lamp; for two objects also `find second`, `take second`, `put second`. A phrase depends
    on the goal alone: `{"find": "find apple", "take": "take apple", "put": "put apple in fridge"}`.
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


def type_of(name: str) -> str:
    """ "cabinet 6" -> "cabinet"."""
    return name.rsplit(" ", 1)[0]
