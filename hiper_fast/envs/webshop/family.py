"""WebShop as `hiper_fast` trains on it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hiper_fast.config import EnvConfig
from hiper_fast.options import option

from .. import family
from ..player import Player
from . import build, load, pages, prompts
from .generate import vocabulary
from .player import Shopper
from .shop import WebShop

HERE = Path(__file__).parent
TUNING = "validation"  # the split to choose settings on


@dataclass(slots=True)
class Options(EnvConfig):
    data: str | None = option(
        None, "the folder of WebShop's files (default: $WEBSHOP_DATA, else the embedded shop)"
    )
    goals: Literal["synthetic", "human"] = option("synthetic", "synthetic or human instructions")
    split_by: Literal["goal", "product"] = option(
        "goal", "goal, as the original, or product: no product in two splits"
    )
    split: str = option("train", "the split to train on")
    eval_split: str = option("test", "the split of the panel test; tune is of validation")
    max_turns: int = option(15, "turns after which an episode is truncated", above=0)


class Family(family.Family):
    Options = Options
    environment = staticmethod(build)
    styles = prompts.STYLES
    tokenizer = HERE / "tokenizer.json"
    defaults = HERE / "defaults.yaml"
    recipe = "webshop"
    is_listed = staticmethod(pages.is_listed)

    def make(self, split: str | None = None) -> WebShop:
        return build(
            split or self.options.split,
            data=self.options.data,
            goals=self.options.goals,
            split_by=self.options.split_by,
        )

    def list_panel(self, panel: str, count: int) -> list[family.Task]:
        split = {"test": self.options.eval_split, "tune": TUNING}[panel]
        goals = self.make(split).panel[:count]
        return [{"options": {"goal": goal}} for goal in goals]

    def find_task(self, name: str) -> family.Task:
        goals = load(self.options.data).goals(self.options.goals)
        number = family.parse_number(name)
        if number >= len(goals):
            raise ValueError(f"there is no goal {name}; the shop has {len(goals)}, from 0 on")
        return {"options": {"goal": goals[number]}}

    def make_player(self, kind: str, env, rng: random.Random) -> Player:
        return Shopper(env.goal["instruction_text"])

    def describe_data(self) -> dict[str, Any]:
        return self.make(self.options.eval_split).provenance

    def split_lines(self, observation: str, commands: list[str]) -> list[tuple[str, bool]]:
        lines = observation.replace(pages.SEPARATOR, "\n").splitlines()
        return [(line, f"{pages.CLICK}{line.lower()}]" in commands) for line in lines]

    @classmethod
    def list_words(cls) -> tuple[list[str], list[str]]:
        return [*prompts.COMPACT_WORDS, *vocabulary()], [pages.CLICK, "search["]
