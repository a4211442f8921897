"""What a scripted player is. Players give the warm start its demonstrations."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol


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
