"""The official games of one split as an environment."""

from __future__ import annotations

import random
from typing import Any

from ..base import Environment, Info, check_options
from .engine import AlfWorld
from .game import Game, games


class AlfWorldSplit:
    """The games of one split: `reset(seed=s)` draws one by the seed, `reset()` the next at random.

    `options={"game": …}` plays that game instead. engine: "native" (`AlfWorld`) or "textworld".
    """

    def __init__(self, split: str = "train", engine: str = "native"):
        self._engine = find_engine(engine)
        self._games = games(split)
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


def find_engine(name: str) -> type[Environment]:
    """What plays a game: "native" or "textworld", the optional package."""
    if name == "native":
        return AlfWorld
    if name == "textworld":
        from .textworld import TextWorld

        return TextWorld
    raise ValueError(f"unknown engine {name!r}; known: native, textworld")
