"""Demonstrations of one's own: episodes in a file, played again in their games so that a model sees what it would see.

A line a JSON object, as `hiper_fast.play --record` writes them (docs/training.md):

    {"env": "household", "game": {"seed": 3}, "weight": 1.0, "turns": [
        {"observation": "You are …", "subgoal": "find mug", "switch": true, "action": "go to desk 1"}, …]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from hiper_fast import response
from hiper_fast.config import Config
from hiper_fast.envs.base import Environment
from hiper_fast.envs.family import Family, Task
from hiper_fast.options import ConfigError, suggest
from hiper_fast.rollout.episode import Play
from hiper_fast.runs.folder import replace_text

OPTION = "warm_start.demonstrations"
SCRIPTED = "search", "listed", "walkthrough"
SUFFIX = ".jsonl"
EPISODE_KEYS = "env", "game", "task", "type", "won", "weight", "turns"
TURN_KEYS = "observation", "subgoal", "switch", "action"
UNREADABLE = "tags or Chinese characters, which break the format of a response"
MOST_WEIGHT = 1e6
SHOWN = 60  # characters of an observation that an error quotes


class Step(NamedTuple):
    """A demonstrated turn."""

    response: str
    observation: str | None  # None: not told, and so not checked


@dataclass(slots=True)
class Demonstration:
    """One line of a file."""

    place: str  # the file and the line, as errors name it
    game: Task
    task: str | None  # its text; None: not told, and so not checked
    weight: float
    steps: list[Step]


class LineError(ValueError):
    """What is wrong with one line."""


def is_file(demonstrations: str) -> bool:
    """Whether the option names a file rather than a scripted player."""
    return demonstrations.endswith(SUFFIX)


def check_name(demonstrations: str) -> None:
    """ConfigError for what is neither."""
    if demonstrations not in SCRIPTED and not is_file(demonstrations):
        near = suggest(demonstrations, list(SCRIPTED), f"a file's name ends in {SUFFIX}")
        raise ConfigError(
            f"{OPTION}: {demonstrations!r} is none of {', '.join(SCRIPTED)}, nor a file; {near}"
        )


def check_file(config: Config) -> None:
    """Reads the file of a run that will imitate it, so that what is broken shows before anything is loaded."""
    begins = config.warm_start.enabled == "yes" and not config.run.resume
    if begins and is_file(config.warm_start.demonstrations):
        read_demonstrations(config)


def read_demonstrations(config: Config) -> list[Demonstration]:
    """The file's episodes; ConfigError names the first broken line, what is wrong, and how many more there are."""
    file = Path(config.warm_start.demonstrations)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{OPTION}: {file} cannot be read ({why})") from None
    read, broken = [], []
    for number, line in enumerate(lines, 1):
        place = f"{file}, line {number}"
        try:
            if line.strip():
                read.append(read_line(line, place, config))
        except LineError as error:
            broken.append(f"{place}: {error}")
    if broken:
        more = f" ({len(broken) - 1} more lines are broken)" if broken[1:] else ""
        raise ConfigError(f"{OPTION}: {broken[0]}{more}")
    if not read:
        raise ConfigError(f"{OPTION}: {file} has no episode")
    return read


def read_line(line: str, place: str, config: Config) -> Demonstration:
    try:
        episode = json.loads(line)
    except ValueError as error:
        raise LineError(f"not JSON ({error})") from None
    except RecursionError:
        raise LineError("not JSON that can be read: it is nested too deep") from None
    check_keys(episode, EPISODE_KEYS, "an episode")
    own, env = config.env.name, episode.get("env")
    if env != own:
        raise LineError(f"env: it was played in {shorten(env)}, and this run plays {own!r}")
    game = episode.get("game")
    if not isinstance(game, dict) or not set(game) <= {"seed", "options"} or not game:
        raise LineError('game: expected what reset takes, {"seed": 3} or {"options": {…}}')
    if type(game.get("seed", 0)) is not int or not isinstance(game.get("options", {}), dict):
        raise LineError("game: its seed is a whole number, its options are an object")
    weight = episode.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise LineError(f"weight: expected a number, got {shorten(weight)}")
    if not 0 < weight <= MOST_WEIGHT:
        raise LineError(f"weight: above 0 and at most {MOST_WEIGHT:g}, got {shorten(weight)}")
    turns = episode.get("turns")
    if not isinstance(turns, list) or not turns:
        raise LineError("turns: expected a list of at least one turn")
    task = read_text(episode, "task")
    return Demonstration(place, game, task, float(weight), list(read_turns(turns, config)))


def read_text(entries: dict[str, Any], key: str) -> str | None:
    """The stripped text of a key; None where there is none."""
    text = entries.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise LineError(f"{key}: expected text, got {type(text).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise LineError(f"{key}: half of a character (a lone surrogate) is no text")
    return text.strip() or None


def check_unseen(shown: Iterable[Demonstration], panel: Iterable[Task]) -> None:
    """ConfigError for a game that the run is evaluated on."""
    evaluated = set(map(spell_game, panel))
    for one in shown:
        if spell_game(one.game) in evaluated:
            raise ConfigError(
                f"{OPTION}: {one.place}: game: the run is evaluated on it (eval.panel), so it cannot be shown; leave "
                "the line out"
            )


def spell_game(game: Task) -> str:
    return json.dumps(game, sort_keys=True, default=str)


def check_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict):
        raise LineError(f"{what} is a JSON object, not {type(value).__name__}")
    for key in value:
        if key not in keys:
            near = suggest(key, list(keys), f"{what} has {', '.join(keys)}")
            raise LineError(f"unknown key {shorten(key)}; {near}")


def read_turns(turns: list, config: Config) -> Iterator[Step]:
    subgoal = None
    for number, turn in enumerate(turns, 1):
        try:
            check_keys(turn, TURN_KEYS, "a turn")
            subgoal, step = read_turn(turn, subgoal, plans=config.agent.subgoals)
        except LineError as error:
            raise LineError(f"turn {number}: {error}") from None
        yield step


def read_turn(turn: dict[str, Any], current: str | None, *, plans: bool) -> tuple[str | None, Step]:
    """The subgoal that the turn leads to, and the turn as a response that keeps the format."""
    action, subgoal = read_text(turn, "action"), read_text(turn, "subgoal") or current
    if action is None:
        raise LineError("it has no action")
    if plans and subgoal is None:
        raise LineError("it has no subgoal, and none has been named before")
    switch = turn.get("switch", subgoal != current)
    if not isinstance(switch, bool):
        raise LineError(f"switch: expected true or false, got {shorten(switch)}")
    if plans and not switch and subgoal != current:
        was = "there is none yet" if current is None else f"that is {shorten(current)}"
        raise LineError(f"switch: false keeps the subgoal, but {was}, not {shorten(subgoal)}")
    text = write_blocks(switch, subgoal, action, plans=plans)
    if not is_readable(text, subgoal, action, plans=plans):
        raise LineError(f"its subgoal or action has {UNREADABLE}")
    return subgoal, Step(text, read_text(turn, "observation"))


def write_blocks(switch: bool, subgoal: str | None, action: str, *, plans: bool = True) -> str:
    """A response; without plans the action alone."""
    blocks = [("switch", "SWITCH" if switch else "KEEP"), ("subgoal", subgoal)] if plans else []
    return "".join(f"<{name}>{text}</{name}>" for name, text in [*blocks, ("action", action)])


def is_readable(text: str, subgoal: str | None, action: str, *, plans: bool) -> bool:
    """Whether the response keeps the format, and is read as it was meant."""
    parsed = response.parse(text, plans=plans)
    return parsed.valid and parsed.action == action and (parsed.subgoal == subgoal or not plans)


class Replay(Play):
    """A demonstration being played again; it ends where the demonstration does."""

    def __init__(self, env: Environment, shown: Demonstration, family: Family, config: Config):
        super().__init__(env, shown.game, family, config)
        self.shown = shown

    def begin(self) -> Replay:
        shown = self.shown
        try:
            super().begin()
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise ConfigError(
                f"{OPTION}: {shown.place}: game: it cannot be begun ({error})"
            ) from error
        if shown.task is not None and shown.task.split() != self.state.task.split():
            raise ConfigError(
                f"{OPTION}: {shown.place}: task: that of the game is {self.state.task!r}, not {shown.task!r}"
            )
        return self

    def speak(self) -> str:
        """The demonstrated response to what is seen now; ConfigError where something else was seen."""
        turn = len(self.episode.responses)
        step, seen = self.shown.steps[turn], self.state.observation
        if step.observation is not None and step.observation.split() != seen.split():
            told = " ".join(step.observation.split())[:SHOWN]
            raise ConfigError(
                f"{OPTION}: {self.shown.place}: turn {turn + 1}: the game shows "
                f"{' '.join(seen.split())[:SHOWN]!r}, not {told!r}; was it recorded with other options of env?"
            )
        return step.response

    def take(self, *returned: Any) -> None:
        super().take(*returned)
        done, steps = len(self.episode.responses), len(self.shown.steps)
        if self.episode.terminated and done < steps:
            raise ConfigError(
                f"{OPTION}: {self.shown.place}: turn {done + 1}: the game was over before it"
            )
        self.over = self.over or done == steps


def record_episode(file: Path, play: Play, game: Task) -> None:
    """Appends a played episode to the file, whole or not at all."""
    episode = play.episode
    turns = [
        {
            "observation": turn.observation,
            "subgoal": turn.subgoal,
            "switch": response.parse(turn.response).switch,
            "action": turn.action,
        }
        for turn in episode.turns
    ]
    content = {
        "env": play.config.env.name,
        "game": game,
        "task": episode.task,
        "type": episode.task_type,
        "won": episode.won,
        "turns": turns,
    }
    former = file.read_text(encoding="utf-8") if file.exists() else ""
    if former and not former.endswith("\n"):
        former += "\n"
    replace_text(file, former + json.dumps(content, default=str) + "\n")
