"""The official games of ALFWorld as `hiper_fast` trains on them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hiper_fast.config import EnvConfig
from hiper_fast.options import option

from .. import family
from ..player import Player
from . import prompts
from .listing import Listing, list_games
from .player import make_player
from .split import HELD_OUT, AlfWorldSplit, hold_out

HERE = Path(__file__).parent


@dataclass(slots=True)
class RoomOptions(EnvConfig):
    engine: Literal["native", "textworld"] = option(
        "native", "native, or textworld: the same games through the real TextWorld"
    )


class RoomFamily(family.Family):
    """What official and generated games share."""

    styles = prompts.STYLES
    tokenizer = HERE / "tokenizer.json"
    strip_opening = staticmethod(prompts.strip_opening)

    def make_player(self, kind: str, env, rng: random.Random) -> Player:
        return make_player(kind, env.game, rng)


@dataclass(slots=True)
class Options(RoomOptions):
    split: str = option("train", "the split to train on")
    eval_split: str = option(
        "valid_seen", "the split of the panel test; tune is games held out of the one to train on"
    )
    task_types: list[str] | None = option(None, "only these task types (default: all six)")
    max_turns: int = option(50, "turns after which an episode is truncated", above=0)


class Family(RoomFamily):
    Options = Options
    environment = AlfWorldSplit
    defaults = HERE / "defaults.yaml"
    recipe = "alfworld"

    def __init__(self, options: Options):
        super().__init__(options)
        self.listings: dict[str, Listing] = {}  # of the splits asked for so far

    def make(self) -> AlfWorldSplit:
        kept, _ = self.divided
        return AlfWorldSplit(self.options.split, self.options.engine, among=kept)

    @cached_property
    def divided(self) -> tuple[list[Path], list[Path]]:
        """The games to train on, and those that are held out of them."""
        return hold_out(self.list_games(self.options.split))

    def list_games(self, split: str) -> list[Path]:
        """The games of a split, each checked; the disk is asked once."""
        if split not in self.listings:
            self.listings[split] = list_games(split, self.options.task_types, check=True)
        return self.listings[split].games

    def list_panel(self, panel: str, count: int) -> list[family.Task]:
        every = self.list_games(self.options.eval_split) if panel == "test" else self.divided[1]
        if not every:
            raise ValueError(
                f"eval.panel tune holds games out of {self.options.split!r}, which has fewer than {HELD_OUT} tasks"
            )
        drawn = random.Random("panel").sample(every, min(count, len(every)))
        return [{"options": {"game": game}} for game in drawn]

    def find_task(self, name: str) -> family.Task:
        return {"options": {"game": name}}

    def describe_data(self) -> dict[str, Any]:
        return {split: str(listing) for split, listing in self.listings.items()}
