"""Seeded ALFWorld games: believable rooms, solvable by construction, with walkthrough and subgoals.

Every draw comes from `random.Random(str).random()`, so a seed names the same game everywhere.
"""

from __future__ import annotations

import random
import re

from ..alfworld.game import TASK_TYPES
from ..alfworld.subgoals import CHANGES, subgoal_phrases
from ..base import check_seed
from .rooms import (
    ABILITIES,
    DATA,
    RECEPTACLES,
    SIZES,
    Plan,
    Receptacle,
    Scene,
    draw_plan,
    draw_scene,
    pick,
)

_DOMAIN = (DATA / "domain.pddl").read_text(encoding="utf-8")
_GRAMMAR = (DATA / "grammar.twl2").read_text(encoding="utf-8")
_KNIVES = {"ButterKnife", "Knife"}  # which the domain names
_SPOKEN = re.compile(r'(?:"rhs":|(?:template|feedback) ::) "((?:[^"\\]|\\.)*)"')  # in the grammar
_MARKUP = re.compile(r"\[.*?\]|\{.*?\}|#.*?#|<.*?>|\\n")
_OTHER_WORDS = "Nothing happens find second take clean heat cool use put in"

TASK_SENTENCES = {
    "pick_and_place_simple": ("put some {o} on {r}.", "put a {o} in {r}."),
    "look_at_obj_in_light": ("look at {o} under the {l}.", "examine the {o} with the {l}."),
    "pick_clean_then_place_in_recep": (
        "clean some {o} and put it in {r}.",
        "put a clean {o} in {r}.",
    ),
    "pick_heat_then_place_in_recep": ("heat some {o} and put it in {r}.", "put a hot {o} in {r}."),
    "pick_cool_then_place_in_recep": ("cool some {o} and put it in {r}.", "put a cool {o} in {r}."),
    "pick_two_obj_and_place": ("put two {o} in {r}.", "find two {o} and put them in {r}."),
}


def generate(task_type: str, seed: int, size: str = "small") -> dict:
    """Make game `seed` of a task type and size: a dict as in an official `game.tw-pddl` file.

    Keys: `pddl_domain`, `grammar`, `pddl_problem`, `solvable` (True), `walkthrough` (list of
    commands that win), `subgoals` (one phrase of `subgoal_phrases` per command), `task_type`,
    `seed`, `size`. The start never satisfies the goal. The same arguments give the same game in
    every process.

    Raises ValueError for a task type outside `TASK_TYPES`, a size outside `SIZES` or a seed that is
    no integer of at least 0.
    """
    if task_type not in TASK_SENTENCES:
        raise ValueError(f"task_type is {task_type!r}; choose one of {', '.join(TASK_TYPES)}")
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    seed = check_seed(seed)
    rng = random.Random(f"{task_type} {size} {seed}")
    plan = draw_plan(rng, task_type)
    scene = draw_scene(rng, plan, size)
    goal = plan.make_goal()
    sentence = pick(rng, TASK_SENTENCES[task_type]).format(
        o=goal.object_type, r=goal.receptacle_type, l=goal.lamp_type
    )
    walkthrough, subgoals = _solve(rng, plan, scene)
    return {
        "pddl_domain": _DOMAIN,
        "grammar": _GRAMMAR.replace("<task>", sentence),
        "pddl_problem": _write_problem(f"household-{task_type}-{size}-{seed}", plan, scene),
        "solvable": True,
        "walkthrough": walkthrough,
        "subgoals": subgoals,
        "task_type": task_type,
        "seed": seed,
        "size": size,
    }


def _solve(rng: random.Random, plan: Plan, scene: Scene) -> tuple[list[str], list[str]]:
    """The commands that win, walked step by step, and the subgoal each of them serves."""
    phrases = subgoal_phrases(plan.make_goal())
    commands: list[str] = []
    subgoals: list[str] = []
    opened: set[str] = set()
    here = None

    def do(command: str, phase: str) -> None:
        commands.append(command)
        subgoals.append(phrases[phase])

    def visit(receptacle: Receptacle, phase: str, open_it: bool = False) -> None:
        nonlocal here
        if receptacle.location != here:
            here = receptacle.location
            do(f"go to {receptacle.name}", phase)
        if open_it and receptacle.openable and receptacle.name not in opened:
            opened.add(receptacle.name)
            do(f"open {receptacle.name}", phase)

    def pick_of_kind(kind: str) -> Receptacle:
        return pick(
            rng, [receptacle for receptacle in scene.receptacles if receptacle.kind == kind]
        )

    end = pick_of_kind(plan.receptacle) if plan.receptacle else None
    for thing, nth in zip(scene.things[: plan.count], ("", " second"), strict=False):
        visit(thing.home, f"find{nth}", open_it=True)
        do(f"take {thing.name} from {thing.home.name}", f"take{nth}")
        if plan.state:
            change, appliance = CHANGES[plan.state], pick_of_kind(CHANGES[plan.state].appliance)
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


def _write_problem(name: str, plan: Plan, scene: Scene) -> str:
    """The PDDL problem, with the types of this room and those that the domain names."""
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
        facts += [f"({ability} {thing.id})" for ability in ABILITIES[thing.kind]]
    for end in ends:
        holds = RECEPTACLES[end]["contains"]
        facts += [f"(canContain {end}Type {kind}Type)" for kind in kinds if kind in holds]

    objects, init = "\n    ".join(declared), "\n    ".join(facts)
    return (
        f"(define (problem {name})\n  (:domain alfred)\n  (:objects\n    {objects})\n"
        f"  (:init\n    {init})\n  (:goal {_write_goal(plan)}))\n"
    )


def _write_goal(plan: Plan) -> str:
    """The goal of a task type, in the shape of the official problems."""
    if plan.lamp:
        return (
            "(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and"
            f" (objectType ?ot {plan.lamp}Type) (toggleable ?ot) (isToggled ?ot)"
            " (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
            " (exists (?o - object ?a - agent) (and"
            f" (objectType ?o {plan.object}Type) (holds ?a ?o))))"
        )

    def say_where(variable: str) -> str:
        return (
            f"(objectType {variable} {plan.object}Type) (receptacleType ?r {plan.receptacle}Type)"
            f" (inReceptacle {variable} ?r)"
        )

    if plan.count == 2:
        second = f"(exists (?o2 - object) (and (not (= ?o1 ?o2)) {say_where('?o2')}))"
        both = f"{say_where('?o1')} {second}"
        return f"(and (exists (?r - receptacle) (exists (?o1 - object) (and {both}))))"
    changed = ""
    if plan.state:
        change = CHANGES[plan.state]
        changed = f"({change.able} ?o) ({change.done} ?o) "
    return (
        f"(and (exists (?r - receptacle) (exists (?o - object) (and {changed}{say_where('?o')}))))"
    )


def vocabulary() -> list[str]:
    """Every word, sorted, that the text, commands, tasks and subgoals of official games may hold.

    Words as they are written ("You", "you"), without numbers and punctuation: the names of all
    object and receptacle types in lower case, and the words of the grammar, of the task sentences
    and of the subgoals.
    """
    names = {kind.lower() for kind in (*ABILITIES, *RECEPTACLES)}
    spoken = _MARKUP.sub(" ", " ".join(_SPOKEN.findall(_GRAMMAR)))
    sentences = re.sub(r"\{.\}", " ", " ".join(sum(TASK_SENTENCES.values(), ())))
    words = re.findall(r"[A-Za-z']+", f"{spoken} {sentences} {_OTHER_WORDS}")
    return sorted(names | set(words))
