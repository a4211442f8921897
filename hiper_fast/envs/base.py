"""What every environment is: text in, text out, in Gymnasium's five-tuple."""

from __future__ import annotations

import operator
from typing import Any, Protocol, runtime_checkable

from hiper_fast.text import PlainError

Info = dict[str, Any]

WON_REWARD = 10.0  # on the winning step; every other step pays 0


class GameError(PlainError, ValueError):
    """Game data that cannot be played; the message names the file and what is wrong with it."""


@runtime_checkable
class Environment(Protocol):
    """A text environment. It never truncates: a turn limit belongs to the rollout.

    `info` holds `won: bool`, `task: str` (the sentence after "Your task is to: "), `task_type: str`
    and `admissible_commands: list[str]`, the caller's own copy.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Begin an episode; returns (observation, info)."""

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        """Act; returns (observation, reward, terminated, truncated, info)."""


def check_command(command: Any) -> str:
    """`command` as it is; TypeError naming its type unless it is a text."""
    if not isinstance(command, str):
        raise TypeError(f"command: expected str, got {type(command).__name__}")
    return command


def check_options(options: dict[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """`options` as a dict; ValueError naming the first one that is not in `known`."""
    for option in options or {}:
        if option not in known:
            raise ValueError(
                f"unknown reset option {option!r}; known: {', '.join(sorted(known)) or 'none'}"
            )
    return options or {}


def check_seed(seed: int) -> int:
    """`seed` as an int; ValueError unless it is an integer of at least 0."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(f"seed is {seed!r}; give an integer of at least 0")
    return value
