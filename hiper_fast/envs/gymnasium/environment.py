"""A Gymnasium environment as `base.Environment`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hiper_fast.options import ConfigError, show_name
from hiper_fast.text import shorten

from ..base import Info
from ..foreign import Wordings, complete

MOST_SAID = 200  # characters of why an environment cannot be made
NOTHING = "Nothing happens."
UNLIMITED = -1  # turns: the rollout counts them


class GymnasiumText:
    """`gymnasium.make(id, **kwargs)`, after `module`, if any, has registered it.

    Observations are texts. Actions are texts, of a `Text` space, or `actions` names those of a `Discrete` one in their
    order. Of `info` it takes `admissible_commands`, `won`, `task`, `task_type` and `task_score`, and for a `Discrete`
    space `action_mask`; without them all actions are possible (every text, of a `Text` space), an episode is won that
    ends with a reward above 0, and `task` is as given.
    """

    free_text = True

    def __init__(
        self,
        id: str,
        module: str | None = None,
        kwargs: dict[str, Any] | None = None,
        actions: list[str] | None = None,
        task: str = "",
    ):
        self.env = make(f"{module}:{id}" if module else id, kwargs or {})
        self.id, self.task, self.wordings = id, task, Wordings()
        self.actions = check_actions(id, self.env.action_space, actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self.check_text(observation), self.complete(info, won=False)

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        """A command that is none of a `Discrete` space's actions leaves all as it is."""
        said = self.wordings.find(command)
        if self.actions and said not in self.actions:
            commands = list(self.info["admissible_commands"])
            return NOTHING, 0.0, False, False, {**self.info, "admissible_commands": commands}
        action = self.actions.index(said) if self.actions else said
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = self.complete(info, won=terminated and reward > 0)
        text = self.check_text(observation)
        return text, float(reward), bool(terminated), bool(truncated), info

    def check_text(self, observation: Any) -> str:
        if isinstance(observation, str):
            return observation
        raise ConfigError(
            f"env.id: observations of {show_name(self.id)} are {type(observation).__name__}, not texts; wrap it in a "
            "gymnasium.ObservationWrapper that writes them out, and register that"
        )

    def complete(self, given: dict[str, Any], won: bool) -> Info:
        possible = given.get("admissible_commands")
        if possible is None and self.actions:
            mask = given.get("action_mask", [True] * len(self.actions))
            possible = [name for name, allowed in zip(self.actions, mask, strict=True) if allowed]
        commands = self.wordings.list(possible)
        self.info = complete(given, commands, task=self.task, task_type=self.id, won=won)
        return self.info

    def close(self) -> None:
        self.env.close()


def make(id: str, kwargs: dict[str, Any]) -> Any:
    """The environment, without Gymnasium's own turn limit; ConfigError where there is none."""
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(
            f"env.name: gymnasium needs its package ({error}); pip install 'hiper_fast[gymnasium]'"
        ) from None
    try:
        return gymnasium.make(id, max_episode_steps=UNLIMITED, disable_env_checker=True, **kwargs)
    except Exception as error:  # whatever an environment does when it is made
        reason = shorten(str(error), MOST_SAID)
        raise ConfigError(
            f"env.id: {show_name(id)} cannot be made ({reason}); --env.module says which module registers it, "
            "--env.kwargs what it is made with"
        ) from error


def check_actions(id: str, space: Any, names: Iterable[str] | None) -> list[str]:
    """The names of a `Discrete` space's actions, none for a `Text` one; ConfigError for what cannot be said."""
    from gymnasium import spaces

    names = list(names or [])
    if isinstance(space, spaces.Text) and not names:
        return []
    if isinstance(space, spaces.Discrete) and space.start == 0 and len(names) == space.n:
        return names
    raise ConfigError(
        f"env.actions: {show_name(id)} has the actions {show_name(space)} and {len(names)} names are given; those of a "
        "Discrete space (from 0 on) need one each, a Text space's none, others cannot be said"
    )
