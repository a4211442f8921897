"""Which games a run plays: fresh training games drawn from the seed, and one fixed panel of unseen ones."""

from __future__ import annotations

import random

from hiper_fast import envs
from hiper_fast.config import Config, ConfigError, environment
from hiper_fast.envs import alfworld

PANEL = 2**31  # household seeds below it are for training, from it on for evaluation


class Games:
    """The environment family of a run. A task is the keyword arguments of `env.reset`."""

    def __init__(self, config: Config):
        self.config, self.seed, self.name = config, config.run.seed, environment(config)
        try:  # what is missing shows now, not in the middle of a run
            self.make(1)[0].reset(**self.panel()[0])
        except (ValueError, ImportError) as error:
            raise ConfigError(f"env: {error}") from None

    def make(self, count: int) -> list:
        """`count` environments."""
        e = self.config.env
        if self.name == "household":
            return [envs.make("household", size=e.size, task_types=e.task_types, engine=e.engine) for _ in range(count)]
        return [envs.make("alfworld", split=e.split, engine=e.engine) for _ in range(count)]

    def training(self, purpose: str, count: int) -> list[dict]:
        """`count` training tasks, drawn from the run's seed and `purpose` ("warm start", "update 7")."""
        rng = random.Random(f"{self.seed} {purpose}")
        return [{"seed": rng.randrange(PANEL)} for _ in range(count)]

    def panel(self) -> list[dict]:
        """The evaluation games, the same for every seed, each exactly once."""
        count = self.config.eval.episodes
        if self.name == "household":
            return [{"seed": PANEL + i} for i in range(count)]
        games = alfworld.games(self.config.env.eval_split)
        return [{"options": {"game": game}} for game in random.Random("panel").sample(games, min(count, len(games)))]
