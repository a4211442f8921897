"""Which games a run plays: fresh training games drawn from the seed, and one fixed panel of unseen ones."""

from __future__ import annotations

import random

from hiper_fast.config import Config, ConfigError, environment
from hiper_fast.families import FAMILIES, PANEL


class Games:
    """The games of a run, of one family."""

    def __init__(self, config: Config):
        self.config, self.seed, self.name = config, config.run.seed, environment(config)
        self.family = FAMILIES[self.name](config.env)
        try:  # what is missing shows now, not in the middle of a run
            self.make(1)[0].reset(**self.panel()[0])
        except (ValueError, ImportError) as error:
            raise ConfigError(f"env: {error}") from None

    def make(self, count: int) -> list:
        """`count` environments."""
        return [self.family.make() for _ in range(count)]

    def training(self, purpose: str, count: int) -> list[dict]:
        """`count` training tasks, drawn from the run's seed and `purpose` ("warm start", "update 7")."""
        rng = random.Random(f"{self.seed} {purpose}")
        return [{"seed": rng.randrange(PANEL)} for _ in range(count)]

    def panel(self) -> list[dict]:
        """The evaluation games, the same for every seed, each exactly once."""
        return self.family.panel(self.config.eval.episodes)
