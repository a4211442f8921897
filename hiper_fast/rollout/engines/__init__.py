"""What answers prompts. Each file of this folder is one engine, a class `Engine`; docs/engines.md.

`rollout.engine` names one: a file here, a name given to `register`, an entry point of the group
hiper_fast.engines, or package.module:Class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hiper_fast.plugins import Plugins


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted."""

    ids: list[int]  # token ids, all that the model reads, not empty
    conversation: int | None = None  # equal: these ids go on from that request's ids and its answer


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    ids: list[int]  # token ids as sampled, the stopping token included
    logprobs: list[float]  # of each, float32, under the tempered distribution it was drawn from


class Engine(Protocol):
    """Samples responses from the policy as it is now."""

    def __init__(self, agent, config, *, temperature: float, seed: int):
        """For the episodes of one update, or of one evaluation; `seed` is that of all its draws."""

    def answer(self, requests: list[Request]) -> list[Answer]:
        """The answers, in the order of the requests."""


_plugins = Plugins(
    "engine", "rollout.engine",
    package="hiper_fast.rollout.engines", attribute="Engine", group="hiper_fast.engines",
)  # fmt: skip
find, names, register = _plugins.find, _plugins.names, _plugins.register
