"""What a model reads at a turn: the state of an episode, and general ways to put it into words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class State:
    """All the agent may know at a turn."""

    task: str
    observation: str
    commands: list[str]  # admissible now
    subgoal: str | None = None  # None before the first one
    history: list[tuple[str, str]] = field(default_factory=list)  # (observation, action)
    refused: int = 0  # how many of the last commands in a row did nothing
    sent: set[str] = field(default_factory=set)  # all actions of the episode
    context: list[int] = field(default_factory=list)  # transcript: token ids before this turn


@dataclass(frozen=True, slots=True)
class Style:
    """A way to put a state into words; `simplify`, if any, is applied to the state first."""

    render: Callable[[State], str]
    simplify: Callable[[State], State] | None = None


INSTRUCTIONS = """You act in a text world, one command a turn. Your task: {task}
You work towards it through short subgoals, each within reach of a few commands.
"""
FORMAT = """\
Decide first whether to keep the current subgoal or to switch to a new one, then act. \
Answer with these blocks only:
<switch>KEEP or SWITCH</switch>
<subgoal>the current subgoal word for word if you keep it, else the new one</subgoal>
<action>one admissible action, word for word</action>
"""


def render_reference(state: State) -> str:
    """The paper's prompt: task, history, observation, subgoal, admissible actions, format."""
    past = "\n".join(f"Observation: {seen}\nAction: {action}" for seen, action in state.history)
    commands = "\n".join(f"'{command}'" for command in state.commands if command != "help")
    return f"""{INSTRUCTIONS.format(task=state.task)}
The last {len(state.history)} observations and actions:
{past or "none yet"}

Current observation:
{state.observation}

Current subgoal: {state.subgoal}

Admissible actions:
{commands}

{FORMAT}"""


def render_transcript(state: State) -> str:
    """One conversation: the first turn gives task and format, every turn what is new."""
    commands = "\n".join(command for command in state.commands if command != "help")
    new = f"""Observation:
{state.observation}

Admissible actions:
{commands}

Current subgoal: {state.subgoal}
"""
    return new if state.context else f"{INSTRUCTIONS.format(task=state.task)}\n{new}\n{FORMAT}"


STYLES = {"reference": Style(render_reference), "transcript": Style(render_transcript)}
