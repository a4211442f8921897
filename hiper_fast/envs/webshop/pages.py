"""What the shop's pages say and what can be clicked on them, rendered once per product."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

SEPARATOR = " [SEP] "
PER_PAGE = 10  # products on a page of results
SEARCH_COMMAND = "search[<your query>]"  # how a prompt lists the search bar
SUB_PAGES = ("description", "features", "reviews", "attributes")


class Node(NamedTuple):
    """One text of a page. kind: text, button, option or product."""

    text: str
    kind: str = "text"


class Page:
    """A page below the instruction: its nodes, its text, and what can be clicked.

    `targets` maps a clickable to what it stands for: an option's name, a product's number, or None for a button.
    """

    __slots__ = ("nodes", "targets", "text", "clickables", "commands")

    def __init__(self, nodes: Sequence[Node], targets: Mapping[str, str | int | None], search_bar: bool = False):
        self.nodes = tuple(nodes)
        self.targets = targets
        self.text = joined([node.text for node in nodes])
        self.clickables = tuple(targets)
        self.commands = (*([SEARCH_COMMAND] if search_bar else []), *(f"click[{name}]" for name in targets))


def joined(texts: Iterable[str]) -> str:
    return SEPARATOR.join([text for text in map(str.strip, texts) if text])


def rich(nodes: Iterable[Node], address: str = "", seen: Iterable[str] = ()) -> str:
    """Nodes in `text_rich` form: a line each, buttons marked, what has been clicked marked and told first.

    address: the part of the page's address that names the chosen options; seen: the ASINs that were opened.
    """
    told, lines = "", []
    for text, kind in nodes:
        if not text.strip():
            continue
        if kind == "button":
            text = f"[button] {text} [button_]"
        elif kind == "option" and f'"{text}"' in address:
            told = f"You have clicked {text}.\n{told}"
            text = f"  [clicked button] {text} [clicked button_]"
        elif kind == "option":
            text = f"  [button] {text} [button_]"
        elif kind == "product":
            text = f"\n[clicked button] {text} [clicked button_]" if text in seen else f"\n[button] {text} [button_]"
        lines.append(text + "\n")
    return told + "".join(lines)


def _buttons(*names: str) -> tuple[list[Node], dict[str, None]]:
    return [Node(name, "button") for name in names], {name.lower(): None for name in names}


def search_head(instruction: str) -> list[Node]:
    return [Node("WebShop"), Node("Instruction: "), Node(instruction)]


def head(instruction: str) -> list[Node]:
    return [Node("Instruction:"), Node(instruction)]


SEARCH = Page(*_buttons("Search"), search_bar=True)


def results(products: Sequence, number: int, total: int) -> Page:
    """Page `number` of the results: `products` are the ones on it, of `total`."""
    first, targets = _buttons("Back to Search")
    turning, turning_targets = _buttons(*(["< Prev"] if number > 1 else []), "Next >")
    nodes = [*first, Node(f"Page {number} (Total results: {total})"), *turning]
    for product in products:
        nodes += product.row
    return Page(nodes, targets | turning_targets | {product.asin.lower(): product.number for product in products})


def row(product) -> tuple[Node, ...]:
    """A product among the results."""
    return Node(product.asin, "product"), Node(product.name), Node(product.price_tag)


def item(product, show_attributes: bool = False) -> Page:
    """A product's own page."""
    leaving, targets = _buttons("Back to Search", "< Prev")
    details = ["Description", "Features", "Reviews", *(["Attributes"] if show_attributes else []), "Buy Now"]
    buttons, button_targets = _buttons(*details)
    nodes, targets = leaving, targets | button_targets
    for name, values in product.options.items():
        nodes += [Node(name), *(Node(value, "option") for value in values)]
        targets |= dict.fromkeys(values, name)
    return Page(
        [*nodes, Node(product.name), Node(f"Price: {product.price_tag}"), Node("Rating: N.A."), *buttons], targets
    )


def sub_page(product, name: str) -> Page:
    """One of `SUB_PAGES`."""
    texts = {
        "description": [product.description],
        "features": [f" {bullet}" for bullet in product.bullets],
        "reviews": [],
        "attributes": [
            *(f" {attribute}" for attribute in product.attributes),
            product.category,
            product.query,
            product.product_category,
        ],
    }[name]
    nodes, targets = _buttons("Back to Search", "< Prev")
    return Page(nodes + [Node(text) for text in texts], targets)


def done(asin: str, options: Mapping[str, str], score: float) -> Page:
    """The page after the purchase, with the score."""
    chosen = json.dumps(options, sort_keys=True)
    for character in "<>&'":
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    texts = [
        "Thank you for shopping with us!",
        "Your code: ",
        "None",
        " (Paste it in your MTurk interface.)",
        "Purchased",
    ]
    texts += ["asin", asin, "options", chosen, "attrs", "None", "category", "None", "query", "None"]
    texts += ["product category", "None", "Target", "asin", "options", "attrs", "price upper", "instuction text"]
    texts += ["category", "product category", "query", "Goal ", "None", "Reward"]
    texts += ["Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"]
    return Page([Node(text) for text in texts], {})
