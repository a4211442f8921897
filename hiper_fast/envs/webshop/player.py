"""The scripted player of WebShop: it knows the instruction and the pages, as an agent must."""

from __future__ import annotations

import math
import random
import re

from ..player import Move
from .pages import SEARCH_COMMAND as SEARCH
from .pages import read_click

PHRASES = {
    "search": "search",
    "choose": "choose product",
    "options": "choose options",
    "buy": "buy",
}
WORD = re.compile(r"[\w'&%-]+")
NOT_SEARCHED = set(
    "a an and are by can find for i in is it looking me need of on please some that the to want "
    "with".split()
)


STEM = 4  # letters of a wanted word that a title's word must begin with
RENUMBERED = 0.5  # how often a stumble names another product, which may not be there
RIGHT_SUBGOAL = 0.5  # how often it keeps the subgoal


class Wish:
    """An instruction, read: the words to search for, the options to choose, the highest price.

    "Find me slim fit shirts with long sleeve with color: red, and size: small, and price lower than
    40.00 dollars" has the words slim fit shirts long sleeve, {"color": "red", "size": "small"} and
    40.0.
    """

    def __init__(self, instruction: str):
        text = instruction.lower()
        self.limit = math.inf
        if match := re.search(r",? and price lower than (\d+\.?\d*) dollars\W*$", text):
            text, self.limit = text[: match.start()], float(match[1])
        self.options: dict[str, str] = {}
        if match := re.search(r" with ((?:(?! with )[^:])+: .+)", text):
            text = text[: match.start()]
            self.options = dict(
                re.findall(r"(?:^|, and )([^:]+): (.+?)(?=, and [^:]+: |$)", match[1])
            )
        self.request = re.sub("^find me ", "", text).replace(",", "")
        self.words = [w for w in WORD.findall(text) if w not in NOT_SEARCHED]


class Shopper:
    """Searches for the instruction's words, opens what fits best, chooses the options and buys.

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
        clicked = read_click(action) if action else None
        if "click[next >]" in commands or SEARCH in commands:
            self.open, self.chosen = None, {}
        elif "click[buy now]" in commands:
            groups = self.read_groups(commands)
            if not self.open:
                self.open = clicked
            self.chosen |= {name: clicked for name in groups if clicked in groups[name]}

    def move(self, commands: list[str]) -> Move:
        if "click[buy now]" in commands:
            return self.move_at_item(commands)
        if SEARCH in commands:
            return Move(PHRASES["search"], self.query)
        if "click[next >]" in commands:
            self.meant = self.find_best() if self.searched == self.query else None
            self.settled = self.meant in self.rejected
            if self.meant is None:
                return Move(PHRASES["search"], "click[back to search]")
            return Move(PHRASES["choose"], f"click[{self.meant}]")
        return Move(PHRASES["options"], "click[< prev]")  # out of a sub-page

    def stumble(self, move: Move, commands: list[str], rng: random.Random) -> Move:
        """Any click but the one that ends it, a poor search, a product that is not there."""
        action = rng.choice([c for c in commands if c != "click[buy now]"])
        if action == SEARCH:
            action = f"search[{rng.choice(self.wish.words or ['gift'])}]"
        elif rng.random() < RENUMBERED:
            action = re.sub(r"\d+\]$", lambda _: f"{rng.randint(10, 99)}]", action)
        if rng.random() < RIGHT_SUBGOAL:
            return Move(move.subgoal, action)
        return Move(rng.choice(list(PHRASES.values())), action)

    def move_at_item(self, commands: list[str]) -> Move:
        if self.open != self.meant:
            return Move(PHRASES["choose"], "click[< prev]")
        missing = [v for v in self.wish.options.values() if f"click[{v}]" not in commands]
        if (missing or self.read_price() > self.wish.limit) and not self.settled:
            self.rejected.add(self.open)
            return Move(PHRASES["choose"], "click[< prev]")
        wishes = [v for k, v in self.wish.options.items() if self.chosen.get(k) != v]
        wanted = [value for value in wishes if value not in missing]
        if wanted:
            return Move(PHRASES["options"], f"click[{wanted[0]}]")
        return Move(PHRASES["buy"], "click[buy now]")

    def read_price(self) -> float:
        return read_dollars(next((s for s in self.segments if s.startswith("Price: ")), ""))

    def find_best(self) -> str | None:
        """The result to open: not rejected, within the limit, with most wanted words, the first."""
        start = self.segments.index("Next >") + 1
        rows = zip(*(self.segments[start + i :: 3] for i in range(3)), strict=False)

        def rate(row):
            asin, title, price = row
            words = WORD.findall(title.lower())
            starts = [wanted[:STEM] for wanted in self.wish.words]
            begun = {start for word in words for start in starts if word.startswith(start)}
            found = sum(start in begun for start in starts)
            cheap = read_dollars(price) <= self.wish.limit
            return asin.lower() not in self.rejected, cheap, found

        found = max(rows, key=rate, default=None)
        return found and found[0].lower()

    def read_groups(self, commands: list[str]) -> dict[str, list[str]]:
        """The page's options: between "< Prev" and the title, what is no click names a group."""
        end = next(i for i, s in enumerate(self.segments) if s.startswith("Price: ")) - 1
        groups: dict[str, list[str]] = {}
        values: list[str] = []
        for segment in map(str.lower, self.segments[self.segments.index("< Prev") + 1 : end]):
            if f"click[{segment}]" in commands:
                values.append(segment)
            else:
                values = groups[segment] = []
        return groups


def read_dollars(text: str) -> float:
    """The highest price in a text, inf without one."""
    return max(map(float, re.findall(r"\$(\d+\.?\d*)", text)), default=math.inf)
