"""The environments as OpenEnv knows them: `make_app(family)` is a server of one, for any number of clients at once.

An episode is a WebSocket session: `reset(seed=3)`, `step({"command": "look"})`. `python -m hiper_fast.serve` runs it.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State

import hiper_fast
from hiper_fast.envs.base import Info
from hiper_fast.envs.family import FIRST_SEEDS, PANEL, Family, Task

MOST_GAMES = 4096  # of a panel that are served


class TextAction(Action):
    command: str


class TextObservation(Observation):
    """`reward` and `done`, which every observation has, and what `envs.base.Environment` gives."""

    text: str
    admissible_commands: list[str]
    won: bool
    task: str
    task_type: str
    score: float | None = None  # WebShop's, 0 to 1


class TextState(State):
    seed: int | None = None
    panels: dict[str, int] = {}  # name -> how many games it has


class Games:
    """What the sessions of a server play: a family's training games by seeds below 2^31, those of its evaluation
    panels from `FIRST_SEEDS` on."""

    def __init__(self, family: Family):
        self.family, self.panels = family, {}
        for panel in FIRST_SEEDS:
            with contextlib.suppress(ValueError, OSError):  # its games are not here
                self.panels[panel] = family.list_panel(panel, MOST_GAMES)

    def find_task(self, seed: int) -> Task:
        """The game of a seed; ValueError for one that is past its panel."""
        if seed < PANEL:
            return {"seed": seed}
        panel = max(
            (name for name in FIRST_SEEDS if FIRST_SEEDS[name] <= seed), key=FIRST_SEEDS.get
        )
        games, number = self.panels.get(panel, []), seed - FIRST_SEEDS[panel]
        if number >= len(games):
            raise ValueError(
                f"seed: {seed} is past the panel {panel}, which has {len(games)} games from {FIRST_SEEDS[panel]} on"
            )
        return games[number]


class TextEnvironment(Environment[TextAction, TextObservation, TextState]):
    """One client's session. A step takes microseconds, so it is made where messages are read, not in a thread."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, games: Games):
        super().__init__()
        self.games, self.env = games, games.family.make()
        panels = {name: len(tasks) for name, tasks in games.panels.items()}
        self.now = TextState(panels=panels)

    def reset(self, seed: int | None = None, episode_id: str | None = None) -> TextObservation:
        """Game `seed`, or one drawn from training's; ValueError for a seed that has none."""
        seed = random.randrange(PANEL) if seed is None else seed
        text, info = self.env.reset(**self.games.find_task(seed))
        panels = self.now.panels
        self.now = TextState(episode_id=episode_id, seed=seed, panels=panels)
        return observe(text, info, None, False)

    def step(self, action: TextAction, timeout_s: float | None = None) -> TextObservation:
        if self.now.seed is None:
            raise RuntimeError("call reset before step")
        text, reward, terminated, truncated, info = self.env.step(action.command)
        self.now.step_count += 1
        return observe(text, info, reward, terminated or truncated)

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None
    ) -> TextObservation:
        return self.reset(seed, episode_id)

    async def step_async(
        self, action: TextAction, timeout_s: float | None = None
    ) -> TextObservation:
        return self.step(action)

    @property
    def state(self) -> TextState:
        return self.now

    def get_metadata(self) -> EnvironmentMetadata:
        name = f"hiper_fast/{self.games.family.options.name}"
        description = "A text environment: one command a turn, those that are possible are listed."
        return EnvironmentMetadata(
            name=name, description=description, version=hiper_fast.__version__
        )

    def close(self) -> None:
        getattr(self.env, "close", lambda: None)()


def observe(text: str, info: Info, reward: float | None, done: bool) -> TextObservation:
    known: dict[str, Any] = {
        name: info[name] for name in ("admissible_commands", "won", "task", "task_type")
    }
    return TextObservation(
        text=text, reward=reward, done=done, score=info.get("task_score"), **known
    )


def make_app(games: Games, sessions: int) -> FastAPI:
    """A server of these games to at most so many sessions at once."""
    make = partial(TextEnvironment, games)
    return create_fastapi_app(make, TextAction, TextObservation, max_concurrent_envs=sessions)
