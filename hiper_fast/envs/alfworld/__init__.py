"""ALFWorld, played from the official `game.tw-pddl` files."""

from ..base import GameError
from .engine import AlfWorld
from .game import TASK_TYPES, Game, Goal
from .listing import games
from .split import AlfWorldSplit

__all__ = ["TASK_TYPES", "AlfWorld", "AlfWorldSplit", "Game", "GameError", "Goal", "games"]
