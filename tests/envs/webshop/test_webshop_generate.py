"""The generated shop: WebShop's formats, believable variety, the same everywhere."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from hiper_fast.envs.webshop.generate import generate, vocabulary

KEYS = {
    "asin",
    "name",
    "category",
    "query",
    "product_category",
    "full_description",
    "small_description",
}
KEYS |= {"images", "customization_options", "average_rating", "page", "pricing"}


def digest(shop):
    return hashlib.sha256(json.dumps(shop).encode()).hexdigest()


def test_items_and_attributes_are_as_webshop_has_them():
    items, attributes = generate()
    assert len(items) == 400 and len({item["asin"] for item in items}) == 400
    assert attributes.keys() == {item["asin"] for item in items}
    for item in items:
        assert item.keys() == KEYS
        assert re.fullmatch(r"[A-Z]{3}\d\d", item["asin"]) and len(item["asin"]) <= 10
        assert re.fullmatch(r"\$\d+\.\d+( - \$\d+\.\d+)?", item["pricing"])
        assert all(1 < len(values) < 5 for values in item["customization_options"].values())
        entry = attributes[item["asin"]]
        assert set(entry["instruction_attributes"]) <= set(entry["attributes"])
        assert entry["instruction"].startswith("Find me ") and item["query"] in entry["instruction"]
        said = " ".join(
            [item["name"], item["full_description"], *item["small_description"]]
        ).lower()
        assert all(attribute in said for attribute in entry["attributes"])
    json.dumps([items, attributes])


def test_a_goal_has_rivals():
    """In a family several products have an attribute, at different prices, with other options."""
    items, attributes = generate()
    families = Counter(item["query"] for item in items)
    assert len(families) == 40 and set(families.values()) == {10}
    alone = 0
    for item in items:
        asked = set(attributes[item["asin"]]["instruction_attributes"])
        rivals = [
            i
            for i in items
            if i["query"] == item["query"] and asked <= set(attributes[i["asin"]]["attributes"])
        ]
        alone += len(rivals) == 1
    assert alone < 0.4 * len(items)
    assert 0.01 < sum("-" in item["pricing"] for item in items) / len(items) < 0.1


def test_the_same_seed_is_the_same_shop_in_every_process():
    code = "import hashlib, json; from hiper_fast.envs.webshop.generate import generate; "
    code += "print(hashlib.sha256(json.dumps(generate(3, 2)).encode()).hexdigest())"
    env = {"PYTHONHASHSEED": "7", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert result.stdout.strip() == digest(generate(3, 2))
    assert digest(generate(4, 2)) != digest(generate(3, 2))


def test_sizes():
    assert len(generate(0, 1)[0]) == 40
    assert len(generate(0, 26)[0]) == 26 * 40


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((-1,), "seed"),
        (("x",), "seed"),
        ((0, 0), "per_family"),
        ((0, 27), "per_family"),
        ((0, 1.5), "per_family"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        generate(*arguments)


def test_the_vocabulary_holds_every_word_of_every_shop():
    known = set(vocabulary())
    for seed in range(3):
        items, attributes = generate(seed)
        for item in items:
            options = json.dumps(item["customization_options"])
            values = re.findall(r'"value": "([^"]+)"', options) + list(
                item["customization_options"]
            )
            text = " ".join(
                [
                    item["name"],
                    item["query"],
                    item["full_description"],
                    *item["small_description"],
                    *values,
                ]
            )
            text += " " + item["asin"] + " " + attributes[item["asin"]]["instruction"]
            assert set(re.findall("[a-z]+", text.lower())) <= known
