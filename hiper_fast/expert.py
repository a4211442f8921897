"""Scripted players for the warm start: one that searches, as an agent must, and one that knows the game's solution."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Protocol

from hiper_fast.envs.household import CHANGES, subgoal_phrases


@dataclass(slots=True)
class Move:
    """What a player does at a turn."""

    subgoal: str
    action: str


class Player(Protocol):
    """Plays one game; `observe`, then `move`, turn after turn."""

    def observe(self, action: str | None, observation: str, commands: list[str]) -> None:
        """Takes in the result of `action` (None at the start)."""

    def move(self, commands: list[str]) -> Move:
        """The best it knows."""

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """A mistake instead of `move`, so that it can be seen how to go on from one."""


def type_of(name: str) -> str:
    """ "cabinet 6" -> "cabinet"."""
    return name.rsplit(" ", 1)[0]


class Searcher:
    """Plays from the text alone: visits receptacles as listed, its destination last, and remembers what it saw."""

    def __init__(self, goal, rng: random.Random):
        self.goal, self.rng = goal, rng
        self.phrases = subgoal_phrases(goal)
        self.change = CHANGES.get(goal.state)
        self.here: str | None = None
        self.holding: str | None = None
        self.receptacles: list[str] = []
        self.unexplored: list[str] = []
        self.seen: dict[str, str] = {}  # object -> receptacle
        self.placed: set[str] = set()  # of two objects, those already there
        self.treated: set[str] = set()

    def observe(self, action: str | None, observation: str, commands: list[str]) -> None:
        """Takes in the result of `action` (None at the start)."""
        if not self.receptacles:
            places = [c.removeprefix("go to ") for c in commands if c.startswith("go to ")]
            self.receptacles = sorted(places, key=lambda r: type_of(r) == self.goal.receptacle_type)
            self.unexplored = list(self.receptacles)
        if observation.startswith("Nothing happens") or action is None:
            return
        if match := re.fullmatch(r"go to (.+)", action):
            self.here = match[1]
        elif match := re.fullmatch(r"take (.+) from .+", action):
            self.holding = match[1]
            self.seen.pop(match[1], None)
            self.placed.discard(match[1])
        elif match := re.fullmatch(r"move (.+) to (.+)", action):
            self.holding = None
            self.seen[match[1]] = match[2]
            ends = (type_of(match[1]), type_of(match[2])) == (self.goal.object_type, self.goal.receptacle_type)
            if self.goal.count == 2 and ends:
                self.placed.add(match[1])
        elif match := re.fullmatch(r"(clean|heat|cool) (.+) with .+", action):
            if self.change and match[1] == self.change.verb:
                self.treated.add(match[2])
            elif match[1] != "clean":
                self.treated.discard(match[2])
        if match := re.search(r"(?:The (.+?) is open\. In it|On the (.+?)), you see (.+?)\.", observation):
            place = match[1] or match[2]
            self.unexplored = [r for r in self.unexplored if r != place]
            self.seen = {o: r for o, r in self.seen.items() if r != place}
            self.seen.update(dict.fromkeys(re.findall(r"\ban? ([a-z]+ \d+)", match[3]), place))
        if self.holding is None:  # free hands are offered all that lies within reach, also beside the place gone to
            reach = [r for r in self.receptacles if f"go to {r}" not in commands and f"open {r}" not in commands]
            self.unexplored = [r for r in self.unexplored if r not in reach]
            takes = (re.fullmatch(r"take (.+) from (.+)", c) for c in commands)
            self.seen.update((m[1], m[2]) for m in takes if m)

    def move(self, commands: list[str]) -> Move:
        if self.holding is None:
            return self.fetch(commands)
        if type_of(self.holding) != self.goal.object_type:
            return Move(self.phrases["find"], self.put_down(commands))
        if self.change and self.holding not in self.treated:
            verb, kind = self.change.verb, self.change.appliance.lower()
            appliance = next(r for r in self.receptacles if type_of(r) == kind)
            action = self.first(commands, f"{verb} {self.holding} with {appliance}", f"go to {appliance}")
            return Move(self.phrases[verb], action)
        if self.goal.lamp_type:
            return self.light(commands)
        target = next(r for r in self.receptacles if type_of(r) == self.goal.receptacle_type)
        return Move(
            self.phrases["put second" if self.placed else "put"],
            self.first(commands, f"move {self.holding} to {target}", f"open {target}", f"go to {target}"),
        )

    def fetch(self, commands: list[str]) -> Move:
        nth = " second" if self.placed else ""
        thing = self.nearest(self.goal.object_type)
        if thing is None:
            return Move(self.phrases["find" + nth], self.search(commands))
        place = self.seen[thing]
        action = self.first(commands, f"take {thing} from {place}", f"open {place}", f"go to {place}")
        return Move(self.phrases[("take" if action.startswith("take ") else "find") + nth], action)

    def light(self, commands: list[str]) -> Move:
        lamp = self.nearest(self.goal.lamp_type)
        if lamp is None:
            return Move(self.phrases["use"], self.search(commands))
        place = self.seen[lamp]
        return Move(self.phrases["use"], self.first(commands, f"use {lamp}", f"open {place}", f"go to {place}"))

    def nearest(self, kind: str) -> str | None:
        """The first thing seen of that type and still wanted, one that is here before others."""
        things = [o for o in self.seen if type_of(o) == kind and o not in self.placed]
        return min(things, key=lambda o: (self.seen[o] != self.here, o), default=None)

    def put_down(self, commands: list[str]) -> str:
        """Rids the hands of a thing taken by mistake: here if it fits, else somewhere else."""
        here = sorted(c for c in commands if c.startswith(("move ", "open ")))
        return here[0] if here else self.rng.choice([c for c in commands if c.startswith("go to ")])

    def search(self, commands: list[str]) -> str:
        if not self.unexplored:
            self.unexplored = list(self.receptacles)
        return self.first(commands, *(f"{verb} {r}" for verb in ("open", "go to") for r in self.unexplored))

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """A random command, half of them with a random number so that it may be inadmissible, or another subgoal."""
        action = rng.choice([c for c in commands if c != "help"])  # whose answer is long, and never shown again
        if rng.random() < 0.5:
            action = re.sub(r"\d+", lambda _: str(rng.randint(1, 4)), action, count=1)
        subgoal = move.subgoal if rng.random() < 0.5 else rng.choice(list(self.phrases.values()))
        return Move(subgoal, action)

    def first(self, commands: list[str], *wanted: str) -> str:
        return next((c for c in wanted if c in commands), "look")


class Walkthrough:
    """Plays the game's own solution. Each step serves the next milestone: a take, change of state, move or use."""

    def __init__(self, goal, walkthrough: tuple[str, ...]):
        self.moves = iter([Move(s, a) for s, a in zip(serves(goal, walkthrough), walkthrough, strict=True)])

    def observe(self, action: str | None, observation: str, commands: list[str]) -> None:
        """Looks at nothing."""

    def move(self, commands: list[str]) -> Move:
        return next(self.moves)

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """Never: the solution holds only from where it was made."""
        return move


def serves(goal, walkthrough) -> list[str]:
    """The subgoal of each step of a walkthrough."""
    phrases, subgoals, taken = subgoal_phrases(goal), [], 0
    for action in walkthrough:
        verb = action.split(" ", 1)[0]
        nth = " second" if taken > 1 or (taken == 1 and verb == "take") else ""
        if verb == "take":
            phase, own = f"find{nth}", f"take{nth}"
            taken += 1
        elif verb in ("clean", "heat", "cool", "use"):
            phase = own = verb
        elif verb == "move":
            phase = own = f"put{nth}"
        else:
            subgoals.append(None)
            continue
        subgoals = [s or phrases[phase] for s in subgoals] + [phrases[own]]
    last = next((s for s in reversed(subgoals) if s), "None")
    return [s or last for s in subgoals]


def player(kind: str, game, rng: random.Random) -> Searcher | Walkthrough:
    """The scripted player `warm_start.demonstrations` names, for one game."""
    return Searcher(game.goal, rng) if kind == "search" else Walkthrough(game.goal, game.walkthrough)
