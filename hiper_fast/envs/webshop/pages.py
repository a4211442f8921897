"""What the shop's pages say and what can be clicked on them, rendered once per product."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

SEPARATOR = " [SEP] "
PER_PAGE = 10  # products on a page of results
QUERY = "<your query>"  # stands for any text
SEARCH_COMMAND = f"search[{QUERY}]"  # how a prompt lists the search bar
CLICK = "click["
SUB_PAGES = ("description", "features", "reviews", "attributes")


class Node(NamedTuple):
    """One text of a page. kind: text, button, option or product."""

    text: str
    kind: str = "text"


class Page:
    """A page below the instruction: its nodes, its text, and what can be clicked.

    `targets` maps a clickable to what it stands for: an option's name, a product's number, or None
    for a button.
    """

    __slots__ = ("nodes", "targets", "text", "clickables", "commands")

    def __init__(
        self,
        nodes: Sequence[Node],
        targets: Mapping[str, str | int | None],
        search_bar: bool = False,
    ):
        self.nodes = tuple(nodes)
        self.targets = targets
        self.text = join_texts([node.text for node in nodes])
        self.clickables = tuple(targets)
        self.commands = (
            *([SEARCH_COMMAND] if search_bar else []),
            *(f"{CLICK}{name}]" for name in targets),
        )


def read_click(command: str) -> str | None:
    """What a command clicks; None for a search."""
    return command[len(CLICK) : -1] if command.startswith(CLICK) else None


def is_listed(action: str, commands: list[str]) -> bool:
    """Whether `action` is among the commands, whatever its words if it is a search."""
    if action in commands:
        return True
    patterns = (command.split(QUERY) for command in commands if QUERY in command)
    return any(
        action.startswith(start) and action.endswith(end) and len(action) > len(start + end)
        for start, end in patterns
    )


def join_texts(texts: Iterable[str]) -> str:
    return SEPARATOR.join([text for text in map(str.strip, texts) if text])


def render_rich(nodes: Iterable[Node], address: str = "", seen: Iterable[str] = ()) -> str:
    """Nodes in `text_rich` form: a line each, buttons marked, what was clicked told first.

    address: the part of the page's address that names the chosen options; seen: the ASINs that were
    opened.
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
            text = (
                f"\n[clicked button] {text} [clicked button_]"
                if text in seen
                else f"\n[button] {text} [button_]"
            )
        lines.append(text + "\n")
    return told + "".join(lines)


def _make_buttons(*names: str) -> tuple[list[Node], dict[str, None]]:
    nodes = [Node(name, "button") for name in names]
    return nodes, dict.fromkeys(map(str.lower, names))


def make_search_head(instruction: str) -> list[Node]:
    return [Node("WebShop"), Node("Instruction: "), Node(instruction)]


def make_head(instruction: str) -> list[Node]:
    return [Node("Instruction:"), Node(instruction)]


SEARCH = Page(*_make_buttons("Search"), search_bar=True)


def make_results(products: Sequence, number: int, total: int) -> Page:
    """Page `number` of the results: `products` are the ones on it, of `total`."""
    first, targets = _make_buttons("Back to Search")
    turning, turning_targets = _make_buttons(*(["< Prev"] if number > 1 else []), "Next >")
    nodes = [*first, Node(f"Page {number} (Total results: {total})"), *turning]
    for product in products:
        nodes += product.row
    return Page(
        nodes,
        targets | turning_targets | {product.asin.lower(): product.number for product in products},
    )


def make_row(product) -> tuple[Node, ...]:
    """A product among the results."""
    return Node(product.asin, "product"), Node(product.name), Node(product.price_tag)


def make_item(product, show_attributes: bool = False) -> Page:
    """A product's own page."""
    leaving, targets = _make_buttons("Back to Search", "< Prev")
    details = [
        "Description",
        "Features",
        "Reviews",
        *(["Attributes"] if show_attributes else []),
        "Buy Now",
    ]
    buttons, button_targets = _make_buttons(*details)
    nodes, targets = leaving, targets | button_targets
    for name, values in product.options.items():
        nodes += [Node(name), *(Node(value, "option") for value in values)]
        targets |= dict.fromkeys(values, name)
    return Page(
        [
            *nodes,
            Node(product.name),
            Node(f"Price: {product.price_tag}"),
            Node("Rating: N.A."),
            *buttons,
        ],
        targets,
    )


def make_sub_page(product, name: str) -> Page:
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
    nodes, targets = _make_buttons("Back to Search", "< Prev")
    return Page(nodes + [Node(text) for text in texts], targets)


def make_done(asin: str, options: Mapping[str, str], score: float) -> Page:
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
    texts += [
        "product category",
        "None",
        "Target",
        "asin",
        "options",
        "attrs",
        "price upper",
        "instuction text",
    ]
    texts += ["category", "product category", "query", "Goal ", "None", "Reward"]
    texts += ["Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"]
    return Page([Node(text) for text in texts], {})
