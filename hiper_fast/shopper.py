"""The scripted player of WebShop for the warm start: it knows the instruction and the pages, as an agent must."""

from __future__ import annotations

import math
import random
import re

from hiper_fast.envs.webshop.pages import SEARCH_COMMAND as SEARCH
from hiper_fast.expert import Move

PHRASES = {"search": "search", "choose": "choose product", "options": "choose options", "buy": "buy"}
WORD = re.compile(r"[\w'&%-]+")
NOT_SEARCHED = set(
    "a an and are by can find for i in is it looking me need of on please some that the to want with".split()
)


class Wish:
    """An instruction, read: the words to search for, the options to choose, the highest price.

    "Find me slim fit shirts with long sleeve with color: red, and size: small, and price lower than 40.00 dollars"
    has the words slim fit shirts long sleeve, {"color": "red", "size": "small"} and 40.0.
    """

    def __init__(self, instruction: str):
        text = instruction.lower()
        self.limit = math.inf
        if match := re.search(r",? and price lower than (\d+\.?\d*) dollars\W*$", text):
            text, self.limit = text[: match.start()], float(match[1])
        self.options: dict[str, str] = {}
        if match := re.search(r" with ((?:(?! with )[^:])+: .+)", text):
            text = text[: match.start()]
            self.options = dict(re.findall(r"(?:^|, and )([^:]+): (.+?)(?=, and [^:]+: |$)", match[1]))
        self.request = re.sub("^find me ", "", text).replace(",", "")
        self.words = [w for w in WORD.findall(text) if w not in NOT_SEARCHED]


class Shopper:
    """Searches for the instruction's words, opens the result that fits best, chooses the options and buys.

    A product that lacks a wanted option, or costs too much, is left for the next best one.
    """

    phrases = PHRASES

    def __init__(self, instruction: str):
        self.wish = Wish(instruction)
        self.query = f"search[{' '.join(self.wish.words)}]"
        self.searched: str | None = None  # the last search
        self.rejected: set[str] = set()  # ASINs as they are clicked
        self.settled = False  # with a product that is not quite it, for lack of a better one
        self.meant: str | None = None  # the ASIN it chose among the results
        self.open: str | None = None  # that of the item page
        self.chosen: dict[str, str] = {}  # option group -> value

    def observe(self, action: str | None, observation: str, commands: list[str]) -> None:
        """Takes in the result of `action` (None at the start)."""
        self.segments = observation.split(" [SEP] ")
        if action and action.startswith("search["):
            self.searched = action
        clicked = action[6:-1] if action and action.startswith("click[") else None
        if "click[next >]" in commands or SEARCH in commands:
            self.open, self.chosen = None, {}
        elif "click[buy now]" in commands:
            groups = self.groups(commands)
            if not self.open:
                self.open = clicked
            self.chosen |= {name: clicked for name, values in groups.items() if clicked in values}

    def move(self, commands: list[str]) -> Move:
        if "click[buy now]" in commands:
            return self.at_item(commands)
        if SEARCH in commands:
            return Move(PHRASES["search"], self.query)
        if "click[next >]" in commands:
            self.meant = self.best() if self.searched == self.query else None
            self.settled = self.meant in self.rejected
            if self.meant is None:
                return Move(PHRASES["search"], "click[back to search]")
            return Move(PHRASES["choose"], f"click[{self.meant}]")
        return Move(PHRASES["options"], "click[< prev]")  # out of a sub-page

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """Instead of `move`: any click but the one that ends it, a poor search, a product that is not there."""
        action = rng.choice([c for c in commands if c != "click[buy now]"])
        if action == SEARCH:
            action = f"search[{rng.choice(self.wish.words or ['gift'])}]"
        elif rng.random() < 0.5:
            action = re.sub(r"\d+\]$", lambda _: f"{rng.randint(10, 99)}]", action)
        return Move(move.subgoal if rng.random() < 0.5 else rng.choice(list(PHRASES.values())), action)

    def at_item(self, commands: list[str]) -> Move:
        if self.open != self.meant:
            return Move(PHRASES["choose"], "click[< prev]")
        missing = [v for v in self.wish.options.values() if f"click[{v}]" not in commands]
        if (missing or self.price() > self.wish.limit) and not self.settled:
            self.rejected.add(self.open)
            return Move(PHRASES["choose"], "click[< prev]")
        wanted = [v for k, v in self.wish.options.items() if self.chosen.get(k) != v and v not in missing]
        if wanted:
            return Move(PHRASES["options"], f"click[{wanted[0]}]")
        return Move(PHRASES["buy"], "click[buy now]")

    def price(self) -> float:
        return dollars(next((s for s in self.segments if s.startswith("Price: ")), ""))

    def best(self) -> str | None:
        """The result to open: not rejected, within the limit, with most of the wanted words, first of these."""
        start = self.segments.index("Next >") + 1
        rows = zip(*(self.segments[start + i :: 3] for i in range(3)), strict=False)

        def fit(row):
            asin, title, price = row
            words = WORD.findall(title.lower())
            found = sum(any(w.startswith(wanted[:4]) for w in words) for wanted in self.wish.words)
            return asin.lower() not in self.rejected, dollars(price) <= self.wish.limit, found

        found = max(rows, key=fit, default=None)
        return found and found[0].lower()

    def groups(self, commands: list[str]) -> dict[str, list[str]]:
        """The item page's option groups: what stands between "< Prev" and the title; what is no click names a group."""
        end = next(i for i, s in enumerate(self.segments) if s.startswith("Price: ")) - 1
        groups: dict[str, list[str]] = {}
        values: list[str] = []
        for segment in map(str.lower, self.segments[self.segments.index("< Prev") + 1 : end]):
            if f"click[{segment}]" in commands:
                values.append(segment)
            else:
                values = groups[segment] = []
        return groups


def dollars(text: str) -> float:
    """The highest price in a text, inf without one."""
    return max(map(float, re.findall(r"\$(\d+\.?\d*)", text)), default=math.inf)
