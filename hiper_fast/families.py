"""What differs between families of environments: their games, prompts, scripted players and tiny tokenizers."""

from __future__ import annotations

import random
from typing import Any, Protocol

from hiper_fast import envs, expert, prompt, shop_prompt, shopper
from hiper_fast.config import EnvConfig
from hiper_fast.envs import alfworld, webshop
from hiper_fast.prompt import Style

Task = dict[str, Any]  # the keyword arguments of `env.reset`

PANEL = 2**31  # seeds below it are for training, from it on for evaluation


class Family(Protocol):
    """The games of one name of `env.name`."""

    styles: dict[str, Style]  # of prompts
    tokenizer: str  # of the tiny model

    def make(self) -> envs.Environment:
        """An environment; all of a family share what is immutable."""

    def panel(self, count: int) -> list[Task]:
        """At most `count` evaluation games, the same for every seed of a run, each once."""

    def named(self, name: str) -> Task:
        """The game a person asks for; ValueError if there is none."""

    def player(self, kind: str, env: envs.Environment, rng: random.Random) -> expert.Player:
        """The scripted player that `warm_start.demonstrations` names, for the game being played in `env`."""

    def provenance(self) -> dict[str, Any]:
        """What a figure was made with, beyond the configuration."""


class Rooms:
    styles = prompt.STYLES
    tokenizer = "household"

    def __init__(self, config: EnvConfig):
        self.config = config

    def player(self, kind: str, env, rng: random.Random) -> expert.Player:
        return expert.player(kind, env.game, rng)

    def provenance(self) -> dict[str, Any]:
        return {}


class Household(Rooms):
    def make(self) -> envs.Environment:
        e = self.config
        return envs.make("household", size=e.size, task_types=e.task_types, engine=e.engine)

    def panel(self, count: int) -> list[Task]:
        return [{"seed": PANEL + i} for i in range(count)]

    def named(self, name: str) -> Task:
        return {"seed": number(name)}


class AlfWorld(Rooms):
    def make(self) -> envs.Environment:
        return envs.make("alfworld", split=self.config.split, engine=self.config.engine)

    def panel(self, count: int) -> list[Task]:
        games = alfworld.games(self.config.eval_split)
        return [{"options": {"game": game}} for game in random.Random("panel").sample(games, min(count, len(games)))]

    def named(self, name: str) -> Task:
        return {"options": {"game": name}}


class WebShop:
    styles = shop_prompt.STYLES
    tokenizer = "webshop"

    def __init__(self, config: EnvConfig):
        self.config = config

    def make(self, split: str | None = None) -> envs.Environment:
        c = self.config
        return envs.make("webshop", data=c.data, split=split or c.split, goals=c.goals, split_by=c.split_by)

    def panel(self, count: int) -> list[Task]:
        return [{"options": {"goal": goal}} for goal in self.make(self.config.eval_split).panel[:count]]

    def named(self, name: str) -> Task:
        goals = webshop.load(self.config.data).goals(self.config.goals)
        if number(name) >= len(goals):
            raise ValueError(f"there is no goal {name}; the shop has {len(goals)}, from 0 on")
        return {"options": {"goal": goals[number(name)]}}

    def player(self, kind: str, env, rng: random.Random) -> expert.Player:
        return shopper.Shopper(env.goal["instruction_text"])

    def provenance(self) -> dict[str, Any]:
        return self.make(self.config.eval_split).provenance


FAMILIES = {"household": Household, "alfworld": AlfWorld, "webshop": WebShop}


def number(name: str) -> int:
    """A game's number; ValueError for anything else."""
    if not name.isdecimal():
        raise ValueError(f"games have numbers from 0 on, got {name!r}")
    return int(name)
