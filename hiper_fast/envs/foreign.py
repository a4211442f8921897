"""What environments from elsewhere have in common: a text, a reward and an end are all that is sure of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hiper_fast.config import EnvConfig
from hiper_fast.options import option

from .base import Info


@dataclass(slots=True)
class ForeignOptions(EnvConfig):
    task: str = option(
        "do what the observations ask for", "the task, where the environment names none"
    )


class Wordings:
    """Commands as the loop has them, in lower case, and as the environment does."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def list(self, commands: Iterable[str] | None) -> list[str]:
        """Takes in what can be said now; of commands that differ in case alone the first."""
        self.of = {}
        for command in commands or ():
            self.of.setdefault(command.lower(), command)
        return list(self.of)

    def find(self, command: str) -> str:
        return self.of.get(command, command)


def complete(
    given: Mapping[str, Any], commands: list[str], *, task: str, task_type: str, won: bool
) -> Info:
    """`info` as `base.Environment` has it, of what an environment gives; `task`, `task_type` and `won` where it is
    silent."""
    info = {
        "admissible_commands": commands,
        "won": bool(given.get("won", won)),
        "task": given.get("task") or task,
        "task_type": given.get("task_type") or task_type,
    }
    scores = (given.get("task_score"), given.get("score"))
    score = next((score for score in scores if score is not None), None)
    return info if score is None else {**info, "task_score": float(score)}
