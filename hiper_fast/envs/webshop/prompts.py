"""What the model reads of WebShop: the general styles, and `compact` for small models."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

from ..prompts import State, Style, render_reference, render_transcript
from .pages import SEARCH_COMMAND, SEPARATOR, read_click
from .player import WORD, Wish

LIMIT = 13_000  # characters; a longer reference prompt drops its history
COMPACT_WORDS = (
    "KEEP SWITCH None task did see subgoal can page total results search click next prev back to "
    "buy now price description features reviews rating N A choose product options find me with for "
    "and lower than dollars of by from nothing missing , . : ; [ ] < > $ - | ="
).split()
NAVIGATION = ("search", "buy now", "next >", "< prev", "back to search")
INFORMATION = ("description", "features", "reviews", "attributes", "rating: n.a.")
RESULT = 3  # segments of a result: ASIN, title, price


def read_page(observation: str, task: str) -> list[str]:
    """The page's segments after the task, which the prompt gives in its own place."""
    segments = observation.split(SEPARATOR)
    return segments[segments.index(task) + 1 :] if task in segments else segments


def quote(observation: str, task: str) -> str:
    return SEPARATOR.join(f"'{segment}'" for segment in read_page(observation, task))


def render_quoted(state: State) -> str:
    """The paper's: quoted segments joined by [SEP], a list of actions; past `LIMIT` no history."""
    task = state.task
    shown = replace(
        state,
        observation=quote(state.observation, task),
        history=[(quote(observation, task), action) for observation, action in state.history],
    )
    text = render_reference(shown)
    return text if len(text) <= LIMIT else render_reference(replace(shown, history=[]))


def render_quoted_transcript(state: State) -> str:
    """One conversation, its pages as in the paper's style."""
    return render_transcript(replace(state, observation=quote(state.observation, state.task)))


def render_compact(state: State) -> str:
    """Past actions only, lower case, few filling words, whole dollars; clickables in brackets.

    What shares a word with the task and was not yet clicked stands at the end, next to the
    response, what shares most last, each as a command in a line of its own; before a search that is
    the instruction's words. An ASIN follows its title and price. An item's page says which options
    of the task are still to be chosen there. Pages that only inform (description, features,
    reviews) stay possible but are not listed.
    """
    wish = Wish(state.task)
    limit = "" if math.isinf(wish.limit) else f" price {math.ceil(wish.limit)}"
    clicks = {name for command in state.commands if (name := read_click(command)) is not None}
    at_item = "buy now" in clicks
    sent = find_recent_actions(state) if at_item else state.sent
    see, fitting = sort_entries(state, wish, clicks, sent)
    can = "".join(f"[{name}]" for name in NAVIGATION if name in clicks)
    did = "".join(action.removeprefix("click") for _, action in state.history)
    best = "\n".join(fitting)
    if at_item:
        wanted = wish.options.items()
        missing = {name: value for name, value in wanted if f"click[{value}]" not in sent}
        best = f"missing:{list_options(missing) or ' nothing'}\n{best}"
    if SEARCH_COMMAND in state.commands:
        best = f"search[{' '.join(wish.words)}]"
    subgoal = f"subgoal: {state.subgoal}\n" if state.plans else ""
    return (
        f"task:{wish.request}{list_options(wish.options)}{limit}\ndid: {did}\n"
        f"see: {' '.join(see)}\ncan: {can}\n{subgoal}{best}\n"
    )


def sort_entries(
    state: State, wish: Wish, clicks: set[str], sent: set[str]
) -> tuple[list[str], list[str]]:
    """The page: what is only seen, and what fits the wish, with its command, the best last."""
    wanted = {*wish.words, *wish.options.values()}
    see: list[str] = []
    fitting: list[tuple[int, int, str]] = []
    segments = read_page(state.observation, state.task)
    for place, (name, *title_and_price) in enumerate(group_entries(segments, clicks)):
        if name in NAVIGATION + INFORMATION:
            continue
        about = " ".join(map(shorten, title_and_price))
        shared = len(wanted.intersection([name, *WORD.findall(" ".join(title_and_price))]))
        if name in clicks and shared and f"click[{name}]" not in sent:
            fitting.append((shared, -place, f"{about}\nclick[{name}]".lstrip()))
        else:
            see.append(f"{about} [{name}]".lstrip() if name in clicks else shorten(name))
    return see, [text for *_, text in sorted(fitting)]


def list_options(options: dict[str, str]) -> str:
    return "".join(f" {name}={value}" for name, value in options.items())


def find_recent_actions(state: State) -> set[str]:
    """Those since results were last shown: an item left for them forgets what was chosen."""
    later = itertools.takewhile(lambda turn: "[SEP] Next >" not in turn[0], reversed(state.history))
    return {action for _, action in later}


def group_entries(segments: list[str], clicks: set[str]) -> Iterator[list[str]]:
    """The segments in lower case, those of a result together."""
    segments = [segment.lower() for segment in segments]
    start = len(segments)
    if "next >" in clicks and "next >" in segments:
        start = segments.index("next >") + 1
    yield from ([segment] for segment in segments[:start])
    yield from (segments[i : i + RESULT] for i in range(start, len(segments), RESULT))


def shorten(text: str) -> str:
    """Without fillers and the number of results; "$18.49" as "19", rounded up as a limit asks."""
    text = re.sub(r" \(total results: \d+\)|,| (?:with|for)(?= )", "", text)
    return re.sub(r"\$(\d+\.?\d*)", lambda match: str(math.ceil(float(match[1]))), text)


STYLES = {
    "reference": Style(render_quoted),
    "compact": Style(render_compact),
    "transcript": Style(render_quoted_transcript),
}
