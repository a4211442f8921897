"""WebShop: a customer's wish, a search bar, pages, options, one purchase; without a server."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from ..base import WON_REWARD, Info, check_command, check_options
from . import pages
from .catalogue import Catalogue, Product
from .goals import Goal, check_goal
from .pages import PER_PAGE, SUB_PAGES, Page
from .reward import get_name

OBSERVATIONS = ("text", "text_rich")


class WebShop:
    """`reset(seed=s)` draws a goal, `reset()` the next; `options={"goal": …}` gives it.

    A command is `search[words]`, on any page, or `click[x]` with x of
    `info["available_actions"]["clickables"]`; anything else leaves the page as it is. Buying ends
    the episode: it pays 10 for a score of exactly 1, else 0.

    `info` holds `available_actions` (`has_search_bar` and `clickables`, as the original gives
    them), `admissible_commands` (the same as commands, the search bar as `search[<your query>]`),
    `task`, `task_type` (the goal's category), `won`, `task_score` (0 until the purchase) and, after
    it, `reward_parts` (see `reward.Reward`).

    goals: "synthetic" or "human". split: train, validation, test, all. split_by: "goal", as the
    original, or "product". observation: "text" or "text_rich". `provenance` says what a figure was
    made with.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        split: str = "train",
        seed: int = 0,
        *,
        goals: str = "synthetic",
        split_by: str = "goal",
        observation: str = "text",
        show_attributes: bool = False,
    ):
        if observation not in OBSERVATIONS:
            raise ValueError(f"observation: {observation!r} is none of {', '.join(OBSERVATIONS)}")
        self.catalogue, self.split, self.split_by, self.kind = catalogue, split, split_by, goals
        self._find_goals()
        self.product: Product | None = None
        self.goal: Goal | None = None
        self._random = random.Random(seed)
        self._rich = observation == "text_rich"
        self._show_attributes = show_attributes

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without what the catalogue has, which every environment of a process shares."""
        own = {
            name: value for name, value in vars(self).items() if name not in ("goals", "indices")
        }
        return own | {"product": self.product and self.product.number}

    def __setstate__(self, own: dict[str, Any]) -> None:
        vars(self).update(own)
        self._find_goals()
        if self.product is not None:
            self.product = self.catalogue.get_product(self.product)

    def _find_goals(self) -> None:
        self.goals = self.catalogue.goals(self.kind)
        self.indices = self.goals.split(self.split, self.split_by)

    @property
    def provenance(self) -> dict[str, Any]:
        """What goes beside a figure: catalogue, its seed, goals, split, and the reward's nouns."""
        return {
            "catalogue": self.catalogue.name,
            "products": len(self.catalogue),
            "catalogue_seed": self.catalogue.seed,
            "goals": self.kind,
            "split": self.split,
            "split_by": self.split_by,
            "nouns": get_name(self.catalogue.reward.nouns),
        }

    @property
    def panel(self) -> list[Goal]:
        """All goals of the split, in its fixed order; those of "test" are the evaluation panel."""
        return [self.goals[index] for index in self.indices.tolist()]

    @property
    def reachable(self) -> bool:
        """Whether this episode's goal can be met to the full (6.6 % of 1,000 products' cannot)."""
        self._check_begun()
        return self.catalogue.reachable(self.goal)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        options = check_options(options, {"goal"})
        if seed is not None:
            self._random = random.Random(seed)
        if "goal" in options:
            self.goal = dict(check_goal(options["goal"]))
        else:
            self.goal = self.goals[int(self.indices[self._random.randrange(len(self.indices))])]
        instruction = self.goal["instruction_text"]
        self._heads = pages.make_search_head(instruction), pages.make_head(instruction)
        self._head_texts = [
            pages.join_texts(map(itemgetter(0), head)) + pages.SEPARATOR for head in self._heads
        ]
        self._score, self._parts = 0.0, None
        self._go_to_search()
        return self._observe(), self._make_info()

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        self._check_begun()
        name, argument = parse(check_command(command))
        if self._parts is not None:
            return self._observe(), 0.0, True, False, self._make_info()
        if name == "search":
            self._go_to_results(argument.split(" "), 1)
        elif name == "click" and argument in self.page.targets and argument != "search":
            self._click(argument)
        bought = self._parts is not None
        reward = WON_REWARD if bought and self._score == 1 else 0.0
        return self._observe(), reward, bought, False, self._make_info()

    def _check_begun(self) -> None:
        if self.goal is None:
            raise RuntimeError("call reset first: no goal has been drawn")

    # Where the customer is. The state has the original's names; `where` is the page's kind.

    def _go_to_search(self) -> None:
        self.keywords: list[str] | None = None
        self.page_number: int | None = None
        self.product = None
        self.options: dict[str, str] = {}
        self.seen: set[str] = set()
        self.where, self.page = "search", pages.SEARCH

    def _go_to_results(self, keywords: list[str], number: int) -> None:
        self.keywords, self.page_number, self.product, self.options = keywords, number, None, {}
        hits = self.catalogue.find_hits(" ".join(keywords))
        shown = [
            self.catalogue.get_product(hit)
            for hit in hits[(number - 1) * PER_PAGE : number * PER_PAGE]
        ]
        self.where, self.page = "results", pages.make_results(shown, number, len(hits))

    def _go_to_item(self) -> None:
        self.where = "item"
        self.page = (
            self.product.page_with_attributes if self._show_attributes else self.product.page
        )

    def _click(self, name: str) -> None:
        """The name counts first, as in the original: an option that reads like a button is one."""
        target = self.page.targets[name]
        if name == "buy now":
            self._buy()
        elif name == "back to search":
            self._go_to_search()
        elif name == "next >" and self.where == "results":
            self._go_to_results(self.keywords, self.page_number + 1)
        elif name == "< prev" and self.where == "results":
            self._go_to_results(self.keywords, self.page_number - 1)
        elif name == "< prev" and self.where == "item":
            self._go_to_results(self.keywords, self.page_number)
        elif name == "< prev":
            self._go_to_item()
        elif name in SUB_PAGES:
            self.where, self.page = "sub-page", self.product.sub_pages[name]
        elif isinstance(target, int):
            self.product = self.catalogue.get_product(target)
            self.seen.add(self.product.asin)
            self._go_to_item()
        else:
            self.options[target] = name
            self._go_to_item()

    def _buy(self) -> None:
        product = self.product
        self._score, self._parts = self.catalogue.reward(
            product, self.goal, product.price, self.options.values()
        )
        self.where, self.page = "done", pages.make_done(product.asin, self.options, self._score)

    # What the customer sees.

    def _observe(self) -> str:
        searching, done = self.where == "search", self.where == "done"
        if not self._rich:
            return (
                self.page.text if done else self._head_texts[0 if searching else 1] + self.page.text
            )
        head = [] if done else self._heads[0 if searching else 1]
        address = f"{'+'.join(self.keywords)} {json.dumps(self.options)}" if self.keywords else ""
        return pages.render_rich([*head, *self.page.nodes], address, self.seen)

    def _make_info(self) -> Info:
        page: Page = self.page
        info = {
            "available_actions": {
                "has_search_bar": self.where == "search",
                "clickables": list(page.clickables),
            },
            "admissible_commands": list(page.commands),
            "task": self.goal["instruction_text"],
            "task_type": self.goal["category"],
            "won": self._score == 1,
            "task_score": self._score,
        }
        if self._parts is not None:
            info["reward_parts"] = dict(self._parts)
        return info


def parse(command: str) -> tuple[str | None, str | None]:
    """(name, argument in lower case) of a command's first line, or (None, None): `(.+)\\[(.+)\\]`.

    Greedy, so the argument begins after the last bracket that leaves one; written without a regular
    expression, which would take quadratic time on a line of brackets.
    """
    line = command.partition("\n")[0]
    closing = line.rfind("]")
    opening = line.rfind("[", 1, max(closing - 1, 0))
    return (line[:opening], line[opening + 1 : closing].lower()) if opening > 0 else (None, None)


def is_admissible(command: str, available_actions: Mapping[str, Any]) -> bool:
    """Whether `command` does something on a page: a search, or a click on one of its clickables."""
    name, argument = parse(command)
    clickable = argument != "search" and argument in available_actions["clickables"]
    return name == "search" or (name == "click" and clickable)
