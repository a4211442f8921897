"""What customers ask for: every goal of a shop, made when it is asked for, and the splits."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .store import Store

Goal = dict[str, Any]

KINDS = ("synthetic", "human")
SPLITS = ("train", "validation", "test", "all")
SPLIT_BY = ("goal", "product")
SPLIT_SEED = 233
PANEL, VALIDATION = 500, 1000  # goals of the test panel and of the validation split

NO_LIMIT = 1000000
_LIMITS = [10.0 * i for i in range(1, 100)]
_KEYS = {
    "query": str,
    "name": str,
    "category": str,
    "product_category": str,
    "instruction_text": str,
    "attributes": list,
    "price_upper": (int, float),
    "goal_options": (dict, list),
}


class Shop(Protocol):
    """What goals are made from: a `Catalogue`."""

    store: Store
    prices: np.ndarray

    def get_product(self, number: int) -> Any: ...

    def reachable(self, goal: Mapping[str, Any]) -> bool: ...


class Goals(Sequence):
    """The goals of one kind, in the order of the file: `goals[i]` is a dict with WebShop's keys.

    synthetic: one for every combination of the options of a product with an instruction. human: one
    for every human instruction with attributes. The price limits are drawn here, after `rng` has
    drawn the prices.
    """

    def __init__(self, shop: Shop, kind: str, rng: random.Random):
        if kind not in KINDS:
            raise ValueError(f"goals: {kind!r} is none of {', '.join(KINDS)}")
        self.shop, self.kind = shop, kind
        store, prices = shop.store, shop.prices
        if kind == "synthetic":
            self._products = np.flatnonzero(store.instructed)
            counts, draws = (
                store.combinations[self._products],
                np.ones(len(self._products), dtype=np.int64),
            )
        else:
            self._products = np.flatnonzero(store.human)
            counts = draws = store.human[self._products]
        self._first = np.concatenate([[0], np.cumsum(counts)])
        drawn_for = np.repeat(self._products, draws)
        self._limits = np.array([_draw_limit(rng, price) for price in prices[drawn_for].tolist()])
        self._reachable: dict[int, bool] = {}
        self._splits: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Goal:
        index = range(len(self))[index]
        place = int(np.searchsorted(self._first, index, side="right")) - 1
        product = self.shop.get_product(int(self._products[place]))
        nth = index - int(self._first[place])
        if self.kind == "synthetic":
            options = _choose_options(product.options, nth)
            said = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = product.instruction + (f" with {said}" if said else "")
            attributes, limit = product.instruction_attributes, float(self._limits[place])
            counts = self.shop.store.attribute_counts
            weight = sum(1.0 / counts[attribute] for attribute in attributes) / len(attributes)
        else:
            asked = product.human[nth]
            options, attributes = list(asked["options"]), asked["attributes"]
            text, limit, weight = asked["instruction"].strip("."), float(self._limits[index]), 1
        if limit != NO_LIMIT:
            text += f", and price lower than {limit:.2f} dollars"
        return {
            "asin": product.asin,
            "category": product.category,
            "query": product.query,
            "name": product.name,
            "product_category": product.product_category,
            "instruction_text": text,
            "attributes": list(attributes),
            "price_upper": limit,
            "goal_options": options,
            "weight": weight,
        }

    def reachable(self, index: int) -> bool:
        """Whether goal `index` can be met to the full; see `Catalogue.reachable`. Remembered."""
        if index not in self._reachable:
            self._reachable[index] = self.shop.reachable(self[index])
        return self._reachable[index]

    def split(self, name: str, by: str = "goal") -> np.ndarray:
        """The indices of the goals in a split, in its fixed order.

        One shuffle with seed 233, for everyone: by "goal", its first 500 are the test panel, the
        next 1,000 are for validation, the others for training. By "product", no product is in two
        splits: products are dealt in shuffled order until a split has as many goals. With at most
        1,500 goals in all, test and validation get a quarter each.
        """
        if name not in SPLITS:
            raise ValueError(f"split: {name!r} is none of {', '.join(SPLITS)}")
        if by not in SPLIT_BY:
            raise ValueError(f"split_by: {by!r} is none of {', '.join(SPLIT_BY)}")
        if (name, by) not in self._splits:
            self._splits[name, by] = self._deal(name, by)
        return self._splits[name, by]

    def _deal(self, name: str, by: str) -> np.ndarray:
        order = _shuffle(len(self))
        test, validation = (
            (PANEL, VALIDATION) if len(self) > PANEL + VALIDATION else (len(self) // 4,) * 2
        )
        if name == "all":
            part = order
        elif by == "goal":
            bounds = {
                "test": (0, test),
                "validation": (test, test + validation),
                "train": (test + validation, None),
            }
            part = order[slice(*bounds[name])]
        else:
            counts = np.diff(self._first)
            dealt = _shuffle(len(counts))
            before = np.cumsum(counts[dealt]) - counts[dealt]  # goals of the products dealt earlier
            in_test = before < test
            for_test = int(counts[dealt][in_test].sum())
            in_validation = ~in_test & (before < for_test + validation)
            chosen = {
                "test": in_test,
                "validation": in_validation,
                "train": ~in_test & ~in_validation,
            }[name]
            wanted = np.zeros(len(counts), dtype=bool)
            wanted[dealt[chosen]] = True
            part = order[np.repeat(wanted, counts)[order]][
                : {"test": test, "validation": validation}.get(name)
            ]
        if not len(part):
            raise ValueError(
                f"split: there is no {name!r} goal; {len(self)} {self.kind} goals split by {by} "
                "leave none for it"
            )
        part.setflags(write=False)
        return part


def _shuffle(count: int) -> np.ndarray:
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    return np.array(order, dtype=np.int64)


def _draw_limit(rng: random.Random, price: float) -> float:
    """The larger of two of the next four limits above the price."""
    first = bisect_right(_LIMITS, price)
    above = _LIMITS[first : first + 4]
    return max(rng.sample(above, 2)) if len(above) >= 2 else NO_LIMIT


def _choose_options(options: Mapping[str, Sequence[str]], nth: int) -> dict[str, str]:
    """The nth choice of a value for every option, names sorted, the last one varying fastest."""
    chosen = {}
    for name in sorted(options, reverse=True):
        nth, place = divmod(nth, len(options[name]))
        chosen[name] = options[name][place]
    return dict(reversed(chosen.items()))


def check_goal(goal: Any) -> Goal:
    """A goal given by the caller, as it is; ValueError naming the first key that is wrong."""
    if not isinstance(goal, Mapping):
        raise ValueError(f"goal: expected a dict with WebShop's keys, got {type(goal).__name__}")
    for key, kinds in _KEYS.items():
        if key not in goal:
            raise ValueError(f"goal: {key!r} is missing")
        if not isinstance(goal[key], kinds):
            raise ValueError(f"goal: {key!r} is {type(goal[key]).__name__}, which it cannot be")
    options = goal["goal_options"]
    for key, texts in [
        ("attributes", goal["attributes"]),
        ("goal_options", options.values() if isinstance(options, dict) else options),
    ]:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"goal: {key!r} must hold texts only")
    if not goal["attributes"]:
        raise ValueError("goal: 'attributes' is empty; a goal asks for at least one")
    return goal
