"""Generated games as an environment."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..alfworld.game import TASK_TYPES, Game
from ..alfworld.split import find_engine
from ..base import Info, check_options, check_seed
from .generator import generate
from .rooms import SIZES, pick


class Household:
    """Generated games without end: `reset(seed=s)` starts game `s`, its task type drawn from `s`.

    `task_types` limits the draw (None: all six); `engine` is "native" or "textworld" (the optional
    package). `reset()` without a seed starts a game nobody chose. Observations, rewards and `info`
    are those of `AlfWorld`; `game` is the parsed game being played, `content` its dict, with
    walkthrough and subgoals.
    """

    def __init__(
        self, size: str = "small", task_types: Sequence[str] | None = None, engine: str = "native"
    ):
        self.size = size
        self.task_types = TASK_TYPES if task_types is None else tuple(task_types)
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
        if not self.task_types or not set(self.task_types) <= set(TASK_TYPES):
            raise ValueError(f"task_types is {task_types!r}; choose from {', '.join(TASK_TYPES)}")
        self.engine = find_engine(engine)
        self.content: dict | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Start game `seed` and return its text and info."""
        check_options(options, set())
        seed = random.SystemRandom().randrange(2**31) if seed is None else check_seed(seed)
        task_type = pick(random.Random(f"household {self.size} {seed}"), self.task_types)
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
