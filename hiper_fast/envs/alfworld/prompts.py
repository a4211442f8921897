"""What the model reads of ALFWorld's games: the general styles, and `compact` for small models."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from .. import prompts
from ..prompts import State, Style
from .engine import NOTHING_HAPPENS

COMPACT_WORDS = (
    "KEEP SWITCH None task did see subgoal can go to take open close move use heat cool clean "
    "slice put from with in on find second examine look inventory some a an two it and , . : ; 's"
).split()
VERBS = ["close", "move", "go to", "open", "heat", "cool", "clean", "slice", "take", "put", "use"]
SEARCHING = ["open", "go to"]
COMMAND = re.compile(rf"({'|'.join(VERBS)}) (.+?)((?: from| to| with| in/on| in| on) .+)?")
WORD, NUMBER = re.compile("[a-z]+"), re.compile("[0-9]+")
PREPOSITIONS = {"to", "from", "with"}
LIST_ITEM = re.compile(r",? (?:and )?an? (?=[a-z]+ \d)")
MOST_REFUSED = 9  # refused commands that are told apart: one digit


def strip_opening(observation: str) -> str:
    """The first observation without TextWorld's banner and the task sentence."""
    return observation.split("=-\n\n")[-1].split("\n\nYour task is to:")[0].strip()


def drop_refused(state: State) -> State:
    """The state as if commands that did nothing had never been sent: nor did they in the game.

    How many of the last ones did nothing stays known, in `refused`.
    """
    outcomes = [observation for observation, _ in state.history[1:]] + [state.observation]
    history, before = [], state.history[0][0] if state.history else state.observation
    refused = 0
    for (_, action), outcome in zip(state.history, outcomes, strict=False):
        if outcome == NOTHING_HAPPENS:
            refused += 1
        else:
            refused = 0
            history.append((before, action))
            before = outcome
    return replace(state, history=history, observation=before, refused=refused)


@functools.lru_cache(maxsize=2**14)
def split_command(command: str) -> tuple[str, str, str, frozenset[str]] | None:
    """Verb, thing, the rest, and all words; None for a command that is not listed."""
    match = COMMAND.fullmatch(command)
    return (*match.groups(default=""), frozenset(WORD.findall(command))) if match else None


def render_compact(state: State) -> str:
    """Places visited, no past observations; lists without articles, commands grouped by verb.

    New commands come before those already sent. Commands that share a word with the task stand at
    the end, next to the response, in full, the new ones and those that share most last. Commands
    that only look (examine, look, inventory, help) stay possible, but are not listed.
    """
    task = set(WORD.findall(state.task)) - PREPOSITIONS
    groups: dict[tuple, list[str]] = {}
    fitting: list[tuple] = []
    for command in state.commands:
        if not (parts := split_command(command)):
            continue
        verb, thing, rest, words = parts
        again, shared = command in state.sent, len(task & words)
        if shared:
            numbers = [-int(number) for number in NUMBER.findall(command)]
            fitting.append((not again, shared, VERBS.index(verb), numbers, command))
        else:
            searching = SEARCHING.index(verb) if verb in SEARCHING else len(SEARCHING)
            groups.setdefault((again, searching, verb, rest), []).append(thing)
    did = "; ".join(action.removeprefix("go to ") for _, action in state.history)
    see = LIST_ITEM.sub(" ", state.observation)
    can = "".join(
        f"{verb} {' '.join(things)}{rest}\n" for (*_, verb, rest), things in sorted(groups.items())
    )
    best = "".join(f"{command}\n" for *_, command in sorted(fitting))
    count = min(state.refused, MOST_REFUSED)
    refused = f"Nothing happens {count}\n" if count else ""
    subgoal = f"subgoal: {state.subgoal}\n" if state.plans else ""
    return f"task: {state.task}\ndid: {did}\nsee: {see}\n{subgoal}{refused}{can}{best}"


STYLES = prompts.STYLES | {"compact": Style(render_compact, simplify=drop_refused)}
