"""Which games a run plays: fresh training games drawn from the seed, and fixed panels of unseen ones."""

from __future__ import annotations

import random

from hiper_fast.config import Config
from hiper_fast.envs.base import Environment, ProtocolError, check_reset, check_step
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


def check_environment(name: str, env: Environment, task: Task) -> None:
    """ConfigError if the first two calls do not give what `envs.base.Environment` promises."""
    try:
        began = env.reset(**task)
    except TypeError as error:
        raise ConfigError(f"env.name: {name}: reset({', '.join(task)}=…) fails: {error}") from error
    try:
        _, info = check_reset(env, began)
        if commands := info["admissible_commands"]:  # else nobody knows what is harmless
            check_step(env, env.step(commands[0]))
    except ProtocolError as error:
        raise ConfigError(f"env.name: {name}: {error}") from None
