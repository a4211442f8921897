"""Which games a run plays: fresh training games drawn from the seed, and fixed panels of unseen ones."""

from __future__ import annotations

import random

from hiper_fast.config import Config
from hiper_fast.envs.base import Environment
from hiper_fast.envs.family import PANEL, Task, families
from hiper_fast.options import ConfigError


class Games:
    """The games of a run, of one family."""

    def __init__(self, config: Config):
        self.config = config
        try:  # what is missing shows now, not in the middle of a run
            self.family = families.find(config.env.name)(config.env)
            check_environment(config.env.name, self.make(1)[0], self.list_panel()[0])
        except ConfigError:
            raise
        except (ValueError, ImportError) as error:
            raise ConfigError(f"env: {error}") from None

    def make(self, count: int) -> list[Environment]:
        """`count` environments."""
        return [self.family.make() for _ in range(count)]

    def draw(self, purpose: str, count: int, group: int = 1) -> list[Task]:
        """`count` training tasks, drawn from the run's seed and `purpose` ("warm start", "update 7").

        `group` in a row are the same game.
        """
        rng = random.Random(f"{self.config.run.seed} {purpose}")
        seeds = [rng.randrange(PANEL) for _ in range(count // group)]
        return [{"seed": seed} for seed in seeds for _ in range(group)]

    def list_panel(self) -> list[Task]:
        """The evaluation games, the same for every seed, each exactly once."""
        return self.family.list_panel(self.config.eval.panel, self.config.eval.episodes)


INFO = {"admissible_commands": list, "won": bool, "task": str, "task_type": str}


def check_environment(name: str, env: Environment, task: Task) -> None:
    """ConfigError if the first two calls do not give what `envs.base.Environment` promises."""
    try:
        began = env.reset(**task)
    except TypeError as error:
        raise ConfigError(f"env.name: {name}: reset({', '.join(task)}=…) fails: {error}") from error
    if not isinstance(began, tuple) or len(began) != 2:
        raise ConfigError(f"env.name: {name}: reset must return (observation, info)")
    check_turn(name, "reset", *began)
    stepped = env.step(began[1]["admissible_commands"][0])
    if not isinstance(stepped, tuple) or len(stepped) != 5:
        raise ConfigError(
            f"env.name: {name}: step must return (observation, reward, terminated, truncated, info)"
        )
    check_turn(name, "step", stepped[0], stepped[-1])


def check_turn(name: str, call: str, observation: str, info: dict) -> None:
    if not isinstance(observation, str):
        raise ConfigError(
            f"env.name: {name}: {call}'s observation must be str, got {type(observation).__name__}"
        )
    for key, kind in INFO.items():
        if not isinstance(info, dict) or not isinstance(info.get(key), kind):
            raise ConfigError(
                f"env.name: {name}: {call}'s info must have {key!r}, a {kind.__name__}"
            )
    if call == "reset" and not info["admissible_commands"]:
        raise ConfigError(
            f"env.name: {name}: reset's info has no admissible_commands: nothing can be done"
        )
