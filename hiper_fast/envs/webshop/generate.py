"""A seeded shop to start with: a few hundred believable products, in WebShop's own file formats.

The products of a family differ in brand, attributes, options and price, so that a goal needs a
search, a choice and the right options. Every draw comes from `random.Random(str).random()`, which
Python keeps stable, so a seed names the same shop everywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import chain

import yaml

from ..base import check_seed

Json = dict[str, object]

ATTRIBUTES = 3  # of a product, at most; of its family there are more
TITLED = 2  # of these, how many its title names
ASKED_ONE = 0.35  # how often an instruction asks for one attribute, else for two
UNTITLED = 0.15  # how often it may ask for what the title leaves out
RANGED = 0.04  # how often the price is a range
CENTS = ("0", "49", "99", "99")


@cache
def _read_shop() -> Json:
    return yaml.safe_load(
        (files("hiper_fast.envs.webshop") / "data" / "shop.yaml").read_text(encoding="utf-8")
    )


def generate(seed: int = 0, per_family: int = 10) -> tuple[list[Json], dict[str, Json]]:
    """Shop `seed`: (items, attributes), as `items_shuffle.json` and `items_ins_v2.json` hold them.

    `per_family` products of each of 40 families, 1 to 26 (no brand twice). Items have WebShop's
    keys; `attributes` maps ASIN to attributes, instruction and instruction_attributes. The same
    arguments give the same shop everywhere.

    Raises ValueError for a seed that is no integer of at least 0 or a `per_family` out of range.
    """
    shop = _read_shop()
    if not isinstance(per_family, int) or not 1 <= per_family <= len(shop["brands"]):
        raise ValueError(
            f"per_family is {per_family!r}; give a number from 1 to {len(shop['brands'])}"
        )
    seed = check_seed(seed)
    items, attributes = [], {}
    for department in shop["departments"]:
        for family in department["families"]:
            rng = random.Random(f"shop {seed} {family['code']}")
            numbers = _draw(rng, range(10, 100), per_family)
            for number, brand in zip(numbers, _draw(rng, shop["brands"], per_family), strict=True):
                asin = f"{family['code']}{number}"
                chosen = _draw(rng, family["attributes"], ATTRIBUTES)
                items.append(_make_item(rng, asin, brand, chosen, family, department))
                attributes[asin] = {"attributes": chosen} | _draw_instruction(rng, family, chosen)
    return _draw(random.Random(f"shop {seed}"), items, len(items)), attributes


def _draw(rng: random.Random, options: Sequence, count: int) -> list:
    """`count` different ones of `options`, in random order."""
    ranked = sorted((rng.random(), place) for place in range(len(options)))
    return [options[place] for _, place in ranked[:count]]


def _make_item(
    rng: random.Random, asin: str, brand: str, chosen: list[str], family: Json, department: Json
) -> Json:
    noun = family["noun"]
    title = f"{brand} {_phrase(noun, chosen[:TITLED])}".title()
    return {
        "asin": asin,
        "name": title.replace(" With ", " with ").replace(" For ", " for "),
        "category": department["category"],
        "query": family["query"],
        "product_category": " › ".join(
            [department["path"], family["aisle"], family["query"].title()]
        ),
        "full_description": f"The {brand} {noun}: {', '.join(chosen)}.",
        # The search reads the first bullet only: there stands what the title leaves out.
        "small_description": [
            _make_bullet(brand, noun, a) for a in [*chosen[TITLED:], *chosen[:TITLED]]
        ],
        "images": [],
        "customization_options": {
            name.title(): _draw_values(rng, name) for name in family["options"]
        },
        "average_rating": 3 + int(rng.random() * 21) / 10,
        "page": 1,
        "pricing": _draw_price(rng, *family["price"]),
    }


@cache
def _read_kinds() -> dict[str, str]:
    """Attribute -> "is", "with" or "for"."""
    return {name: kind for kind, names in _read_shop()["attributes"].items() for name in names}


def _phrase(noun: str, attributes: list[str]) -> str:
    """ "bpa free kettle with tempered glass for dining room"."""
    said = {"is": [], "with": [], "for": []}
    for attribute in attributes:
        said[_read_kinds()[attribute]].append(attribute)
    before = [", ".join(said["is"])] if said["is"] else []
    after = [f"{kind} {', '.join(said[kind])}" for kind in ("with", "for") if said[kind]]
    return " ".join([*before, noun, *after])


def _make_bullet(brand: str, noun: str, attribute: str) -> str:
    comes = {
        "is": f"is {attribute}",
        "with": f"comes with {attribute}",
        "for": f"was made for {attribute}",
    }
    return f"{attribute.capitalize()}: the {noun} by {brand} {comes[_read_kinds()[attribute]]}."


def _draw_values(rng: random.Random, name: str) -> list[Json]:
    """Two to four values of an option, in the order of the pool."""
    pool = _read_shop()["options"][name]
    kept = _draw(rng, pool, min(len(pool), 2 + int(rng.random() * 3)))
    return [
        {"is_selected": False, "value": v.title(), "price_string": "", "price": 0}
        for v in pool
        if v in kept
    ]


def _draw_price(rng: random.Random, low: int, high: int) -> str:
    dollars = low + int(rng.random() * (high - low))
    price = f"${dollars}.{CENTS[int(rng.random() * len(CENTS))]}"
    return f"{price} - ${dollars + 5}.99" if rng.random() < RANGED else price


def _draw_instruction(rng: random.Random, family: Json, chosen: list[str]) -> Json:
    """Mostly asks for what the title names, now and then for what only the page tells."""
    known = chosen if rng.random() < UNTITLED else chosen[:TITLED]
    asked = _draw(rng, known, 1 if rng.random() < ASKED_ONE else 2)
    return {
        "instruction": f"Find me {_phrase(family['query'], asked)}",
        "instruction_attributes": asked,
    }


def vocabulary() -> list[str]:
    """Every word, in lower case, and the numbers that texts of generated shops may hold."""
    items, attributes = generate(0, 4)
    shop = _read_shop()
    families = list(chain.from_iterable(d["families"] for d in shop["departments"]))
    texts = [
        *(item[key] for item in items for key in ("name", "product_category", "full_description")),
        *(line for item in items for line in item["small_description"]),
        *(entry["instruction"] for entry in attributes.values()),
        *shop["brands"],
        *chain.from_iterable(shop["attributes"].values()),
        *chain.from_iterable(shop["options"].values()),
        *shop["options"],
        *(family["code"] for family in families),
    ]
    words = {word for text in texts for word in re.findall("[a-z]+", text.lower())}
    return sorted(words) + [str(n) for n in (*range(100), 100, 110, 120, 130)]
