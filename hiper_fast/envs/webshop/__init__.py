"""WebShop in one Python process: `Catalogue` is the shop, `WebShop` the environment."""

from __future__ import annotations

import os
from functools import cache

from .catalogue import Catalogue, Product
from .generate import generate
from .goals import Goals
from .items import DataError
from .reward import find_nouns
from .shop import WebShop, is_admissible

__all__ = [
    "Catalogue",
    "DataError",
    "Goals",
    "Product",
    "WebShop",
    "build",
    "find_nouns",
    "is_admissible",
    "load",
]


def load(
    data: str | os.PathLike | None = None,
    *,
    catalogue_seed: int = 0,
    size: str | None = None,
    nouns: str = "auto",
) -> Catalogue:
    """The shop in the folder `data` (default: $WEBSHOP_DATA), or without either the embedded one.

    The same arguments give the same object, so that all environments of a process share it.
    `catalogue_seed` draws prices and limits, and makes the embedded shop; size and nouns are as in
    `Catalogue.load`.
    """
    folder = data or os.environ.get("WEBSHOP_DATA")
    return _load(os.path.abspath(folder) if folder else None, catalogue_seed, size, nouns)


@cache
def _load(folder: str | None, seed: int, size: str | None, nouns: str) -> Catalogue:
    if folder:
        catalogue = Catalogue.load(folder, seed, size=size, nouns=nouns)
    else:
        name = f"embedded shop {seed}"
        catalogue = Catalogue.from_items(*generate(seed), seed=seed, nouns=nouns, name=name)
    return catalogue.remember(_load, folder, seed, size, nouns)


def build(
    split: str = "train",
    seed: int = 0,
    data: str | os.PathLike | None = None,
    catalogue_seed: int = 0,
    size: str | None = None,
    nouns: str = "auto",
    goals: str = "synthetic",
    split_by: str = "goal",
    observation: str = "text",
    show_attributes: bool = False,
) -> WebShop:
    """What `envs.make("webshop", …)` calls: `load` and `WebShop` in one."""
    catalogue = load(data, catalogue_seed=catalogue_seed, size=size, nouns=nouns)
    return WebShop(
        catalogue,
        split,
        seed,
        goals=goals,
        split_by=split_by,
        observation=observation,
        show_attributes=show_attributes,
    )
