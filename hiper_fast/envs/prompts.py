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
    plans: bool = True  # the agent pursues subgoals; False: it only acts


@dataclass(frozen=True, slots=True)
class Style:
    """A way to put a state into words; `simplify`, if any, is applied to the state first."""

    render: Callable[[State], str]
    simplify: Callable[[State], State] | None = None


TASK = "You act in a text world, one command a turn. Your task: {task}"
PLANNING = "You work towards it through short subgoals, each within reach of a few commands."
FORMAT = """\
Decide first whether to keep the current subgoal or to switch to a new one, then act. \
Answer with these blocks only:
<switch>KEEP or SWITCH</switch>
<subgoal>the current subgoal word for word if you keep it, else the new one</subgoal>
<action>one admissible action, word for word</action>
"""
ACTION_FORMAT = """\
Answer with this block only:
<action>one admissible action, word for word</action>
"""
LISTED, FREE = "one admissible action, word for word", "your action"


def render_reference(state: State) -> str:
    """The paper's prompt: task, history, observation, subgoal, admissible actions, format."""
    past = "\n".join(f"Observation: {seen}\nAction: {action}" for seen, action in state.history)
    return join_paragraphs(
        instruct(state),
        f"The last {len(state.history)} observations and actions:\n{past or 'none yet'}",
        f"Current observation:\n{state.observation}",
        name_subgoal(state),
        list_commands(state, "'{}'"),
        ask(state),
    )


def render_transcript(state: State) -> str:
    """One conversation: the first turn gives task and format, every turn what is new."""
    new = (
        f"Observation:\n{state.observation}",
        list_commands(state, "{}"),
        name_subgoal(state),
    )
    if state.context:
        return join_paragraphs(*new) + "\n"
    return join_paragraphs(instruct(state), *new, ask(state))


def instruct(state: State) -> str:
    task = TASK.format(task=state.task)
    return f"{task}\n{PLANNING}" if state.plans else task


def name_subgoal(state: State) -> str:
    return f"Current subgoal: {state.subgoal}" if state.plans else ""


def list_commands(state: State, form: str) -> str:
    """The paragraph of what can be done; none where that is any text."""
    if not state.commands:
        return ""
    listed = [form.format(command) for command in state.commands if command != "help"]
    return "\n".join(["Admissible actions:", *listed])


def ask(state: State) -> str:
    text = FORMAT if state.plans else ACTION_FORMAT
    return text if state.commands else text.replace(LISTED, FREE)


def join_paragraphs(*paragraphs: str) -> str:
    return "\n\n".join(filter(None, paragraphs))


STYLES = {"reference": Style(render_reference), "transcript": Style(render_transcript)}
