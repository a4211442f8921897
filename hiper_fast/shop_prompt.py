"""What the model reads at a turn of WebShop, in the styles of `hiper_fast.prompt`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

from hiper_fast import prompt
from hiper_fast.envs.webshop.pages import SEARCH_COMMAND
from hiper_fast.prompt import State, Style
from hiper_fast.shopper import WORD, Wish

LIMIT = 13_000  # characters; a longer reference prompt drops its history
COMPACT_WORDS = (
    "KEEP SWITCH None task did see subgoal can page total results search click next prev back to buy now price "
    "description features reviews rating N A choose product options find me with for and lower than dollars "
    "of by from nothing missing , . : ; [ ] < > $ - | ="
).split()
NAVIGATION = ("search", "buy now", "next >", "< prev", "back to search")
INFORMATION = ("description", "features", "reviews", "attributes", "rating: n.a.")


def page(observation: str, task: str) -> list[str]:
    """The page's segments after the task, which the prompt gives in its own place."""
    segments = observation.split(" [SEP] ")
    return segments[segments.index(task) + 1 :] if task in segments else segments


def quoted(observation: str, task: str) -> str:
    return " [SEP] ".join(f"'{segment}'" for segment in page(observation, task))


def reference(state: State) -> str:
    """The paper's: quoted segments joined by [SEP], a list of actions; past the limit the history goes."""
    shown = replace(
        state,
        observation=quoted(state.observation, state.task),
        history=[(quoted(observation, state.task), action) for observation, action in state.history],
    )
    text = prompt.reference(shown)
    return text if len(text) <= LIMIT else prompt.reference(replace(shown, history=[]))


def transcript(state: State) -> str:
    """One conversation, its pages as in the paper's style."""
    return prompt.transcript(replace(state, observation=quoted(state.observation, state.task)))


def compact(state: State) -> str:
    """For small models: past actions only, lower case, few filling words, whole dollars; clickables in brackets.

    What shares a word with the task and was not yet clicked stands at the end, next to the response, what shares most
    last, each as a command in a line of its own; before a search that is the instruction's words. An ASIN follows its
    title and price. An item's page says which options of the task are still to be chosen there. Pages that only
    inform (description, features, reviews) stay possible but are not listed.
    """
    wish = Wish(state.task)
    options = listed(wish.options)
    limit = "" if math.isinf(wish.limit) else f" price {math.ceil(wish.limit)}"
    wanted = {*wish.words, *wish.options.values()}
    clicks = {c[6:-1] for c in state.commands if c.startswith("click[")}
    at_item = "buy now" in clicks
    sent = since_results(state) if at_item else state.sent
    see: list[str] = []
    fitting: list[tuple[int, int, str]] = []
    for place, (name, *title_and_price) in enumerate(entries(page(state.observation, state.task), clicks)):
        if name in NAVIGATION + INFORMATION:
            continue
        about = " ".join(map(shortened, title_and_price))
        shared = len(wanted.intersection([name, *WORD.findall(" ".join(title_and_price))]))
        if name in clicks and shared and f"click[{name}]" not in sent:
            fitting.append((shared, -place, f"{about}\nclick[{name}]".lstrip()))
        else:
            see.append(f"{about} [{name}]".lstrip() if name in clicks else shortened(name))
    can = "".join(f"[{c}]" for c in NAVIGATION if c in clicks)
    did = "".join(action.removeprefix("click") for _, action in state.history)
    best = "\n".join(text for *_, text in sorted(fitting))
    if at_item:
        missing = {name: value for name, value in wish.options.items() if f"click[{value}]" not in sent}
        best = f"missing:{listed(missing) or ' nothing'}\n{best}"
    if SEARCH_COMMAND in state.commands:
        best = f"search[{' '.join(wish.words)}]"
    return (
        f"task:{wish.request}{options}{limit}\ndid: {did}\nsee: {' '.join(see)}\ncan: {can}\n"
        f"subgoal: {state.subgoal}\n{best}\n"
    )


def listed(options: dict[str, str]) -> str:
    return "".join(f" {name}={value}" for name, value in options.items())


def since_results(state: State) -> set[str]:
    """The actions since results were last shown: an item forgets what was chosen when it is left for them."""
    later = itertools.takewhile(lambda turn: "[SEP] Next >" not in turn[0], reversed(state.history))
    return {action for _, action in later}


def entries(segments: list[str], clicks: set[str]) -> Iterator[list[str]]:
    """The segments in lower case, those of a result (ASIN, title, price) together."""
    segments = [s.lower() for s in segments]
    start = segments.index("next >") + 1 if "next >" in clicks and "next >" in segments else len(segments)
    yield from ([s] for s in segments[:start])
    yield from (segments[i : i + 3] for i in range(start, len(segments), 3))


def shortened(text: str) -> str:
    """Without "with", "for", commas and the number of results; "$18.49" as "19", rounded up as a limit asks."""
    text = re.sub(r" \(total results: \d+\)|,| (?:with|for)(?= )", "", text)
    return re.sub(r"\$(\d+\.?\d*)", lambda m: str(math.ceil(float(m[1]))), text)


STYLES = {"reference": Style(reference), "compact": Style(compact), "transcript": Style(transcript)}
