"""What every environment is: text in, text out, in Gymnasium's five-tuple."""

from __future__ import annotations

import operator
from typing import Any, Protocol, runtime_checkable

from hiper_fast.text import PlainError

Info = dict[str, Any]

INFO = {"admissible_commands": list, "won": bool, "task": str, "task_type": str}  # what info holds
WON_REWARD = 10.0  # on the winning step; every other step pays 0


class GameError(PlainError, ValueError):
    """Game data that cannot be played; the message names the file and what is wrong with it."""


class ProtocolError(PlainError, ValueError):
    """An environment returned what `Environment` does not promise; the message says which call, and what."""


@runtime_checkable
class Environment(Protocol):
    """A text environment. It never truncates: a turn limit belongs to the rollout.

    `info` holds `won: bool`, `task: str` (the sentence after "Your task is to: "), `task_type: str`
    and `admissible_commands: list[str]`, the caller's own copy. It is empty only where the environment has
    `free_text = True`: then any text is a command.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Begin an episode; returns (observation, info)."""

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        """Act; returns (observation, reward, terminated, truncated, info)."""


def check_reset(env: Environment, returned: Any) -> tuple[str, Info]:
    """What `reset` returned, as it is; ProtocolError unless it is what `Environment` promises."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ProtocolError("reset must return (observation, info)")
    _check_turn("reset", *returned)
    if not (returned[1]["admissible_commands"] or getattr(env, "free_text", False)):
        raise ProtocolError(
            "reset's info has no admissible_commands: nothing can be done (if any text is a command, give the class "
            "free_text = True)"
        )
    return returned


def check_step(env: Environment, returned: Any) -> tuple[str, float, bool, bool, Info]:
    """What `step` returned, as it is; ProtocolError unless it is what `Environment` promises."""
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise ProtocolError("step must return (observation, reward, terminated, truncated, info)")
    observation, _, terminated, _, info = returned
    _check_turn("step", observation, info)
    if terminated not in (True, False):
        raise ProtocolError(f"step's terminated must be a bool, got {type(terminated).__name__}")
    return returned


def _check_turn(call: str, observation: Any, info: Any) -> None:
    if not isinstance(observation, str):
        raise ProtocolError(f"{call}'s observation must be str, got {type(observation).__name__}")
    for key, kind in INFO.items():
        if not isinstance(info, dict) or not isinstance(info.get(key), kind):
            raise ProtocolError(f"{call}'s info must have {key!r}, a {kind.__name__}")
    if not all(isinstance(command, str) for command in info["admissible_commands"]):
        raise ProtocolError(f"{call}'s admissible_commands must be a list of str")
    if not isinstance(info.get("task_score"), int | float | None):
        raise ProtocolError(f"{call}'s task_score must be a number")


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
