"""Generated games as `hiper_fast` trains on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hiper_fast.options import option

from ..alfworld.family import RoomFamily, RoomOptions
from ..alfworld.prompts import COMPACT_WORDS
from . import generator
from .environment import Household


@dataclass(slots=True)
class Options(RoomOptions):
    max_turns: int = option(10, "turns after which an episode is truncated", above=0)
    size: Literal["small", "medium", "large"] = option("small", "small, medium or large rooms")
    task_types: list[str] | None = option(None, "only these task types (default: all six)")


class Family(RoomFamily):
    Options = Options
    environment = Household
    defaults = Path(__file__).with_name("defaults.yaml")

    @classmethod
    def list_words(cls) -> tuple[list[str], list[str]]:
        return [*COMPACT_WORDS, *generator.vocabulary()], []
