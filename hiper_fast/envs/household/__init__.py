"""Seeded games in the format of ALFWorld: any number of them, without data."""

from ..alfworld.game import TASK_TYPES
from ..alfworld.subgoals import CHANGES, Change, subgoal_phrases
from .environment import Household
from .generator import TASK_SENTENCES, generate, vocabulary
from .rooms import SIZES

__all__ = [
    "CHANGES",
    "SIZES",
    "TASK_SENTENCES",
    "TASK_TYPES",
    "Change",
    "Household",
    "generate",
    "subgoal_phrases",
    "vocabulary",
]
