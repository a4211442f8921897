"""Scripted players: one that searches, as an agent must, and one that knows the solution."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ..player import Move
from .dialect import PUT
from .game import Game, Goal
from .subgoals import CHANGES, subgoal_phrases, type_of

LISTED = r"(?:The (.+?) is open\. In it|On the (.+?)), you see (.+?)\."
PLACED = r"(?:move|put) (.+) (?:to|in/on) (.+)"
RENUMBERED = 0.5  # how often a stumble has a random number, so that it may be inadmissible
HIGHEST_NUMBER = 4  # of these
RIGHT_SUBGOAL = 0.5  # how often a stumble keeps the subgoal


class Searcher:
    """Plays from the text alone: visits receptacles in random order, or `as_listed` with its destination last."""

    def __init__(self, goal: Goal, rng: random.Random, *, as_listed: bool = False):
        self.goal, self.rng, self.as_listed = goal, rng, as_listed
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
            if not self.as_listed:
                self.rng.shuffle(self.unexplored)
        if observation.startswith("Nothing happens") or action is None:
            return
        if match := re.fullmatch(r"go to (.+)", action):
            self.here = match[1]
        elif match := re.fullmatch(r"take (.+) from .+", action):
            self.holding = match[1]
            self.seen.pop(match[1], None)
            self.placed.discard(match[1])
        elif match := re.fullmatch(PLACED, action):
            self.holding = None
            self.seen[match[1]] = match[2]
            kinds = type_of(match[1]), type_of(match[2])
            goal_kinds = self.goal.object_type, self.goal.receptacle_type
            if self.goal.count == 2 and kinds == goal_kinds:
                self.placed.add(match[1])
        elif match := re.fullmatch(r"(clean|heat|cool) (.+) with .+", action):
            if self.change and match[1] == self.change.verb:
                self.treated.add(match[2])
            elif match[1] != "clean":
                self.treated.discard(match[2])
        self.look(observation)
        if self.holding is None:
            self.reach(commands)

    def look(self, observation: str) -> None:
        """Remembers what a receptacle that is seen holds."""
        if match := re.search(LISTED, observation):
            place = match[1] or match[2]
            self.unexplored = [r for r in self.unexplored if r != place]
            self.seen = {thing: r for thing, r in self.seen.items() if r != place}
            self.seen.update(dict.fromkeys(re.findall(r"\ban? ([a-z]+ \d+)", match[3]), place))

    def reach(self, commands: list[str]) -> None:
        """Free hands are offered all that lies within reach, also beside the place gone to."""
        self.unexplored = [
            r for r in self.unexplored if f"go to {r}" in commands or f"open {r}" in commands
        ]
        takes = (re.fullmatch(r"take (.+) from (.+)", command) for command in commands)
        self.seen.update((match[1], match[2]) for match in takes if match)

    def move(self, commands: list[str]) -> Move:
        if self.holding is None:
            return self.fetch(commands)
        if type_of(self.holding) != self.goal.object_type:
            return Move(self.phrases["find"], self.put_down(commands))
        if self.change and self.holding not in self.treated:
            verb, kind = self.change.verb, self.change.appliance.lower()
            appliance = next(r for r in self.receptacles if type_of(r) == kind)
            action = self.choose_first(
                commands, f"{verb} {self.holding} with {appliance}", f"go to {appliance}"
            )
            return Move(self.phrases[verb], action)
        if self.goal.lamp_type:
            return self.light(commands)
        target = next(r for r in self.receptacles if type_of(r) == self.goal.receptacle_type)
        puts = [f"{verb} {self.holding} {into} {target}" for verb, into in PUT.values()]
        return Move(
            self.phrases["put second" if self.placed else "put"],
            self.choose_first(commands, *puts, f"open {target}", f"go to {target}"),
        )

    def fetch(self, commands: list[str]) -> Move:
        nth = " second" if self.placed else ""
        thing = self.find_nearest(self.goal.object_type)
        if thing is None:
            return Move(self.phrases["find" + nth], self.search(commands))
        place = self.seen[thing]
        action = self.choose_first(
            commands, f"take {thing} from {place}", f"open {place}", f"go to {place}"
        )
        return Move(self.phrases[("take" if action.startswith("take ") else "find") + nth], action)

    def light(self, commands: list[str]) -> Move:
        lamp = self.find_nearest(self.goal.lamp_type)
        if lamp is None:
            return Move(self.phrases["use"], self.search(commands))
        place = self.seen[lamp]
        action = self.choose_first(commands, f"use {lamp}", f"open {place}", f"go to {place}")
        return Move(self.phrases["use"], action)

    def find_nearest(self, kind: str) -> str | None:
        """The first thing seen of that type and still wanted, one that is here before others."""
        things = [o for o in self.seen if type_of(o) == kind and o not in self.placed]
        return min(things, key=lambda o: (self.seen[o] != self.here, o), default=None)

    def put_down(self, commands: list[str]) -> str:
        """Rids the hands of a thing taken by mistake: here if it fits, else somewhere else."""
        here = sorted(c for c in commands if c.startswith(("move ", "put ", "open ")))
        if here:
            return here[0]
        return self.rng.choice([c for c in commands if c.startswith("go to ")])

    def search(self, commands: list[str]) -> str:
        if not self.unexplored:
            self.unexplored = list(self.receptacles)
        verbs = ("open", "go to")
        wanted = [f"{verb} {place}" for verb in verbs for place in self.unexplored]
        return self.choose_first(commands, *wanted)

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """A random command, or one that names what may not be there, or another subgoal."""
        # The answer to "help" is long, and never shown again.
        action = rng.choice([c for c in commands if c != "help"])
        if rng.random() < RENUMBERED:
            action = re.sub(r"\d+", lambda _: str(rng.randint(1, HIGHEST_NUMBER)), action, count=1)
        if rng.random() < RIGHT_SUBGOAL:
            return Move(move.subgoal, action)
        return Move(rng.choice(list(self.phrases.values())), action)

    def choose_first(self, commands: list[str], *wanted: str) -> str:
        return next((c for c in wanted if c in commands), "look")


class Walkthrough:
    """Plays the game's own solution; a step serves the next take, change, put or use."""

    def __init__(self, goal: Goal, walkthrough: tuple[str, ...]):
        self.moves = map(Move, assign_subgoals(goal, walkthrough), walkthrough)

    def observe(self, action: str | None, observation: str, commands: list[str]) -> None:
        """Looks at nothing."""

    def move(self, commands: list[str]) -> Move:
        return next(self.moves)

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """Never: the solution holds only from where it was made."""
        return move


def assign_subgoals(goal: Goal, walkthrough: Sequence[str]) -> list[str]:
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
        elif verb in ("move", "put"):
            phase = own = f"put{nth}"
        else:
            subgoals.append(None)
            continue
        subgoals = [s or phrases[phase] for s in subgoals] + [phrases[own]]
    last = next((s for s in reversed(subgoals) if s), "None")
    return [s or last for s in subgoals]


def make_player(kind: str, game: Game, rng: random.Random) -> Searcher | Walkthrough:
    """The scripted player `warm_start.demonstrations` names, for one game."""
    if kind == "walkthrough":
        return Walkthrough(game.goal, game.walkthrough)
    return Searcher(game.goal, rng, as_listed=kind == "listed")
