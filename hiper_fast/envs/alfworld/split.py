"""The official games of one split as an environment."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..base import Environment, Info, check_options
from .engine import AlfWorld
from .game import Game
from .listing import games

HELD_OUT = 20  # one task in so many is kept to choose settings on


class AlfWorldSplit:
    """The games of one split: `reset(seed=s)` draws one by the seed, `reset()` the next at random.

    `options={"game": …}` plays that game instead. engine: "native" (`AlfWorld`) or "textworld".
    task_types: only these (None: all six). among: draw from these games of the split alone.
    """

    def __init__(
        self,
        split: str = "train",
        engine: str = "native",
        *,
        task_types: Collection[str] | None = None,
        among: list[Path] | None = None,
    ):
        self._engine = find_engine(engine)
        self._games = games(split, task_types) if among is None else among
        self._random = random.Random()
        self._env: Environment | None = None

    @property
    def game(self) -> Game:
        """The game being played."""
        if self._env is None:
            raise RuntimeError("call reset first: no game has been drawn")
        return self._env.game

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        options = check_options(options, {"game"})
        if seed is not None:
            self._random = random.Random(seed)
        game = options["game"] if "game" in options else self._random.choice(self._games)
        if self._env is None:
            self._env = self._engine(game)
        return self._env.reset(options={"game": game})

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        if self._env is None:
            raise RuntimeError("call reset before step")
        return self._env.step(command)


def hold_out(every: list[Path]) -> tuple[list[Path], list[Path]]:
    """The games to train on, and others: of a twentieth of their tasks, all trials of each."""
    tasks: dict[Path, list[Path]] = {}
    for game in every:
        tasks.setdefault(game.parent.parent, []).append(game)
    held = set(random.Random("tune").sample(list(tasks), len(tasks) // HELD_OUT))
    kept = [game for task, trials in tasks.items() if task not in held for game in trials]
    return kept, [game for task, trials in tasks.items() if task in held for game in trials]


def find_engine(name: str) -> type[Environment]:
    """What plays a game: "native" or "textworld", the optional package."""
    if name == "native":
        return AlfWorld
    if name == "textworld":
        from .textworld import TextWorld

        return TextWorld
    raise ValueError(f"unknown engine {name!r}; known: native, textworld")
