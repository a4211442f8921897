"""What an environment brings to training: games, options, prompts, a scripted player, words."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hiper_fast.config import EnvConfig
from hiper_fast.options import ConfigError
from hiper_fast.plugins import Plugins

from . import prompts
from .base import Environment
from .player import Player

Task = dict[str, Any]  # the keyword arguments of `env.reset`

SAMPLED = 64  # games whose first turns give the words of a tokenizer
PANEL = 2**31  # seeds below it are for training, from it on for evaluation
MARKS = " \t\r\n'\"`\u2018\u2019\u201c\u201d"  # what a command may be quoted in
FIRST_SEEDS = {"tune": PANEL, "test": PANEL + 2**30}  # of each panel


class Family:
    """The games of one `env.name`. A subclass says what differs: often `environment` alone."""

    Options: type[EnvConfig] = EnvConfig  # of `env.*`
    environment: Callable[..., Environment]  # what `envs.make(name, **options)` calls
    styles: Mapping[str, prompts.Style] = prompts.STYLES
    tokenizer: Path | None = None  # tokenizer.json of the tiny model; None: one is made
    defaults: Path | None = (
        None  # a YAML file that lies over the general defaults, for the tiny model
    )
    recipe: str = "hiper-reference"  # the shipped recipe that does so for a pretrained model

    def __init__(self, options: EnvConfig):
        self.options = options

    def make(self) -> Environment:
        """An environment, with the family's own options; all of a family share what is immutable."""
        common = {field.name for field in dataclasses.fields(EnvConfig)}
        own = dataclasses.asdict(self.options).items()
        return type(self).environment(**{name: value for name, value in own if name not in common})

    def list_panel(self, panel: str, count: int) -> list[Task]:
        """At most `count` games of the panel "test" or "tune", which share none with each other or with
        training: the same for every seed of a run, each once."""
        return [{"seed": FIRST_SEEDS[panel] + i} for i in range(count)]

    def find_task(self, name: str) -> Task:
        """The game a person asks for; ValueError if there is none."""
        return {"seed": parse_number(name)}

    def make_player(self, kind: str, env: Environment, rng: random.Random) -> Player:
        """The player that `warm_start.demonstrations` names, for the game being played in `env`."""
        raise ConfigError(
            f"{self.options.name} has no scripted player; use --warm_start.enabled no"
        )

    def describe_data(self) -> dict[str, Any]:
        """What a figure was made with, beyond the configuration."""
        return {}

    def strip_opening(self, observation: str) -> str:
        """The first observation without what the prompt gives in its own place."""
        return observation.strip()

    def is_listed(self, action: str, commands: list[str]) -> bool:
        """Whether `action` is among the commands; where there are none, any is."""
        return not commands or action in commands

    def is_near_miss(self, action: str, commands: list[str]) -> bool:
        """Whether `action` is not listed, but is without quotes, backticks, a full stop, case."""
        if self.is_listed(action, commands):
            return False
        return self.is_listed(strip_marks(action), [strip_marks(command) for command in commands])

    def split_lines(self, observation: str, commands: list[str]) -> list[tuple[str, bool]]:
        """The observation as a person reads it: each line, and whether it can be clicked."""
        return [(line, False) for line in observation.splitlines()]

    def list_words(self) -> tuple[list[str], list[str]]:
        """The tokens of the tiny tokenizer: words, and command openings. Here of some first turns."""
        env, texts = self.make(), [prompts.TASK, prompts.PLANNING, prompts.FORMAT]
        for seed in range(SAMPLED):
            observation, info = env.reset(seed=seed)
            texts += [observation, info["task"], *info["admissible_commands"]]
        return sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)}), []


class Families(Plugins):
    def find(self, name: str) -> type[Family]:
        """As of `Plugins`; ConfigError too for what is no family that can be played."""
        family = super().find(name)
        if not isinstance(family, type) or not issubclass(family, Family):
            raise ConfigError(f"env.name: {name} is no class below hiper_fast.envs.family.Family")
        if not hasattr(family, "environment"):
            raise ConfigError(f"env.name: {name} has no `environment`: say which class is played")
        return family


families = Families(
    "environment",
    "env.name",
    package="hiper_fast.envs",
    module="family",
    attribute="Family",
    group="hiper_fast.families",
)


def strip_marks(command: str) -> str:
    """A command without what a writer puts around it: quotes, blanks, full stops behind; lower-case."""
    return command.lstrip(MARKS).rstrip(MARKS + ".").lower()


def parse_number(name: str) -> int:
    """A game's number; ValueError for anything else."""
    if not name.isdecimal():
        raise ValueError(f"games have numbers from 0 on, got {name!r}")
    return int(name)
