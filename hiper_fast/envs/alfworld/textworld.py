"""The second engine: the same games through the real TextWorld package, behind the same interface.

Thousands of times slower than `alfworld.AlfWorld`, its judge in tests. `pip install
'hiper_fast[alfworld]'`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..base import WON_REWARD, Info, check_command, check_options
from .game import Game, find_game_file, make_text_names, read_game


class TextWorld:
    """Plays one game with TextWorld; the interface of `AlfWorld`, to the letter."""

    def __init__(self, game: Mapping[str, Any] | str | os.PathLike):
        try:
            import textworld
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise ImportError(
                "engine 'textworld' needs the textworld package: pip install 'hiper_fast[alfworld]'"
            ) from error
        self._engine = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
        self._load(game)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        options = check_options(options, {"game"})
        if "game" in options:
            self._load(options["game"])
        with _keep_arguments():
            state = self._engine.reset()
        self._won = state["won"]
        return state.feedback, self._make_info(state)

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        state, _, _ = self._engine.step(check_command(command))
        reward = WON_REWARD if state["won"] and not self._won else 0.0
        self._won = state["won"]
        return state.feedback, reward, self._won, False, self._make_info(state)

    def _load(self, game: Mapping[str, Any] | str | os.PathLike) -> None:
        if isinstance(game, Mapping):
            content, name = game, "game"
        elif isinstance(game, str | os.PathLike):
            path = find_game_file(game)
            content, name = read_game(path), str(path)
        else:
            raise TypeError(
                f"engine 'textworld' plays a game file or dict, not {type(game).__name__}"
            )
        self.game = Game.from_dict(content, name)
        with _keep_arguments():
            self._engine.load(dict(content))
        # TextWorld alone shows ids; the names of ALFWorld are its own layer on top.
        entities = self._engine._entity_infos
        for id_, name in make_text_names(entities).items():
            entities[id_].name = name

    def _make_info(self, state: Any) -> Info:
        return {
            "admissible_commands": list(state["admissible_commands"]),
            "won": state["won"],
            "task": self.game.task,
            "task_type": self.game.task_type,
        }


@contextmanager
def _keep_arguments() -> Iterator[None]:
    """TextWorld's planner overwrites sys.argv."""
    arguments = sys.argv
    try:
        yield
    finally:
        sys.argv = arguments
