"""What answers prompts. Each file of this folder is one engine, a class `Engine`; docs/engines.md.

`rollout.engine` names one: a file here, a name given to `register`, an entry point of the group
hiper_fast.engines, or package.module:Class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hiper_fast.options import ConfigError
from hiper_fast.plugins import Plugins

if TYPE_CHECKING:
    from hiper_fast.agent.agent import Agent
    from hiper_fast.agent.speaker import Speaker
    from hiper_fast.config import Config


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted."""

    ids: list[int]  # token ids, all that the model reads, not empty
    seed: int  # of its draws alone, in [0, 2**63); rollout/draws.py has the numbers that it stands for
    temperature: float  # 0: greedy
    conversation: int | None = None  # equal: these ids go on from that request's ids and its answer


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    ids: list[int]  # token ids as sampled, the stopping token included
    logprobs: list[float]  # of each, float32, under the tempered distribution it was drawn from


class Engine(Protocol):
    """Samples responses from the policy. One lives as long as its run; it works between `wake` and `sleep`."""

    capacity: int  # requests under way at once; no more are submitted

    def __init__(self, agent: Agent, config: Config):
        """config.agent.max_response_tokens bounds a response, agent.stop_ids end it."""

    def wake(self) -> None:
        """A rollout or an evaluation begins: takes the memory that it needs."""

    def update(self) -> None:
        """The agent's weights may be others now; nothing is under way. From here on answers are theirs."""

    def submit(self, key: int, request: Request) -> None:
        """Takes a request; `key` is its own among those under way."""

    def collect(self) -> list[tuple[int, Answer]]:
        """Goes on with what is under way, for a moment or until a response is whole: those that are, in any order."""

    def cancel(self, key: int) -> None:
        """Drops a request, if it is under way."""

    def sleep(self) -> None:
        """The rollout is over: drops what is under way and gives memory back for the update."""

    def close(self) -> None:
        """The run is over."""


_plugins = Plugins(
    "engine", "rollout.engine",
    package="hiper_fast.rollout.engines", attribute="Engine", group="hiper_fast.engines",
)  # fmt: skip
find, names, register = _plugins.find, _plugins.names, _plugins.register
_METHODS = ("wake", "update", "submit", "collect", "cancel", "sleep", "close")


def make(agent: Speaker, config: Config) -> Engine:
    """The engine that `rollout.engine` names; ConfigError where it is none."""
    engine = find(config.rollout.engine)(agent, config)
    missing = [name for name in _METHODS if not callable(getattr(engine, name, None))]
    if not isinstance(getattr(engine, "capacity", None), int) or engine.capacity < 1:
        missing.append("capacity, at least 1")
    if missing:
        raise ConfigError(
            f"rollout.engine: {config.rollout.engine} has no {', '.join(missing)}; docs/engines.md shows a whole one"
        )
    return engine
