"""Environments: `make(name, **config)` builds one that speaks as `base.Environment` says."""

from __future__ import annotations

import inspect
from typing import Any

from hiper_fast.options import ConfigError

from .base import Environment
from .family import Family, families

__all__ = ["Environment", "Family", "make"]


def make(name: str, **config: Any) -> Environment:
    """Build an environment whose `reset(seed=…)` draws the episode.

    - `make("household", size="small", task_types=None)`: generated games.
    - `make("alfworld", split="train", task_types=None, engine="native")`: the official games under
      $ALFWORLD_DATA; `engine="textworld"` plays them through the TextWorld package.
    - `make("webshop", split="train", data=None)`: WebShop on the files in the folder `data`
      (default: $WEBSHOP_DATA, else the embedded shop), and all options of `webshop.build`.
    - `make("package.module:Family", …)`: an environment of another package.

    Raises ValueError for an unknown name and for options the environment does not take.
    """
    try:
        build = families.find(name).environment
    except ConfigError as error:
        if ":" in name or name in families.names():
            raise
        known = ", ".join(families.names())
        raise ValueError(f"unknown environment {name!r}; known: {known}") from error
    known = inspect.signature(build).parameters
    for option in config:
        if option not in known:
            raise ValueError(f"unknown option {option!r} for {name}; known: {', '.join(known)}")
    return build(**config)
