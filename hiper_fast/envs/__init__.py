"""Environments: `make(name, **config)` builds one. See `base.Environment` for what each of them speaks."""

from __future__ import annotations

import inspect
from typing import Any

from .base import Environment

__all__ = ["Environment", "make"]


def make(name: str, **config: Any) -> Environment:
    """Build an environment whose `reset(seed=…)` draws the episode.

    - `make("household", size="small", task_types=None)`: generated games.
    - `make("alfworld", split="train", engine="native")`: the official games under $ALFWORLD_DATA;
      `engine="textworld"` plays them through the TextWorld package.
    - `make("webshop", split="train", data=None)`: WebShop on the files in the folder `data` (default: $WEBSHOP_DATA,
      else the embedded shop), and the options of `webshop.WebShop` and of `webshop.load`.

    Raises ValueError for an unknown name and for options the environment does not take.
    """
    if name == "household":
        from .household import Household as builder
    elif name == "alfworld":
        from .alfworld import AlfWorldSplit as builder
    elif name == "webshop":
        from .webshop import build as builder
    else:
        raise ValueError(f"unknown environment {name!r}; known: alfworld, household, webshop")
    known = inspect.signature(builder).parameters
    for option in config:
        if option not in known:
            raise ValueError(f"unknown option {option!r} for {name}; known: {', '.join(known)}")
    return builder(**config)
