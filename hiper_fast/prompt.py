"""What the model reads at a turn, in three styles, within a token limit that never raises."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from hiper_fast.config import AgentConfig


@dataclass(slots=True)
class State:
    """All the agent may know at a turn."""

    task: str
    observation: str
    commands: list[str]  # admissible now
    subgoal: str | None = None  # None before the first one
    history: list[tuple[str, str]] = field(default_factory=list)  # (observation, action), oldest first
    refused: int = 0  # how many of the last commands in a row did nothing
    sent: set[str] = field(default_factory=set)  # all actions of the episode
    context: list[int] = field(default_factory=list)  # transcript: token ids read and answered before this turn


@dataclass(frozen=True, slots=True)
class Style:
    """A way to put a state into words."""

    render: Callable[[State], str]
    refused: bool = True  # whether commands that did nothing are shown


NOTHING = "Nothing happens."


def without_refused(state: State) -> State:
    """The state as if commands answered by `NOTHING` had never been sent: they changed nothing in the game either.

    How many of the last ones did nothing stays known, in `refused`.
    """
    outcomes = [observation for observation, _ in state.history[1:]] + [state.observation]
    history, before = [], state.history[0][0] if state.history else state.observation
    refused = 0
    for (_, action), outcome in zip(state.history, outcomes, strict=False):
        if outcome == NOTHING:
            refused += 1
        else:
            refused = 0
            history.append((before, action))
            before = outcome
    return replace(state, history=history, observation=before, refused=refused)


INSTRUCTIONS = """You act in a text world, one command a turn. Your task: {task}
You work towards it through short subgoals, each within reach of a few commands.
"""
FORMAT = """\
Decide first whether to keep the current subgoal or to switch to a new one, then act. Answer with these blocks only:
<switch>KEEP or SWITCH</switch>
<subgoal>the current subgoal word for word if you keep it, else the new one</subgoal>
<action>one admissible action, word for word</action>
"""


def reference(state: State) -> str:
    """The structure of the paper's prompt: task, history, observation, subgoal, admissible actions, format."""
    past = "\n".join(f"Observation: {observation}\nAction: {action}" for observation, action in state.history)
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


def transcript(state: State) -> str:
    """One conversation: the first turn gives task and format, every turn what is new; a command a line, unquoted."""
    commands = "\n".join(command for command in state.commands if command != "help")
    new = f"""Observation:
{state.observation}

Admissible actions:
{commands}

Current subgoal: {state.subgoal}
"""
    return new if state.context else f"{INSTRUCTIONS.format(task=state.task)}\n{new}\n{FORMAT}"


COMPACT_WORDS = (
    "KEEP SWITCH None task did see subgoal can go to take open close move use heat cool clean slice put from with in "
    "on find second examine look inventory some a an two it and , . : ; 's"
).split()
VERBS = ["close", "move", "go to", "open", "heat", "cool", "clean", "slice", "take", "put", "use"]
SEARCHING = ["open", "go to"]
COMMAND = re.compile(rf"({'|'.join(VERBS)}) (.+?)((?: from| to| with| in| on) .+)?")
WORD, NUMBER = re.compile("[a-z]+"), re.compile("[0-9]+")
PREPOSITIONS = {"to", "from", "with"}
LIST_ITEM = re.compile(r",? (?:and )?an? (?=[a-z]+ \d)")


def compact(state: State) -> str:
    """For small models: places visited instead of past observations, lists without articles, commands grouped by verb.

    New commands come before those already sent. Commands that share a word with the task stand at the end, next to
    the response, in full, the new ones and those that share most last. Commands that only look (examine, look,
    inventory, help) stay possible, but are not listed.
    """
    task = set(WORD.findall(state.task)) - PREPOSITIONS
    groups: dict[tuple, list[str]] = {}
    fitting: list[tuple] = []
    for command in state.commands:
        if match := COMMAND.fullmatch(command):
            again, shared = command in state.sent, len(task.intersection(WORD.findall(command)))
            verb, thing, rest = match.groups(default="")
            if shared:
                numbers = [-int(n) for n in NUMBER.findall(command)]
                fitting.append((not again, shared, VERBS.index(verb), numbers, command))
            else:
                searching = SEARCHING.index(verb) if verb in SEARCHING else len(SEARCHING)
                groups.setdefault((again, searching, verb, rest), []).append(thing)
    did = "; ".join(action.removeprefix("go to ") for _, action in state.history)
    see = LIST_ITEM.sub(" ", state.observation)
    can = "".join(f"{verb} {' '.join(things)}{rest}\n" for (*_, verb, rest), things in sorted(groups.items()))
    best = "".join(f"{command}\n" for *_, command in sorted(fitting))
    refused = f"Nothing happens {min(state.refused, 9)}\n" if state.refused else ""
    return f"task: {state.task}\ndid: {did}\nsee: {see}\nsubgoal: {state.subgoal}\n{refused}{can}{best}"


STYLES = {
    "reference": Style(reference),
    "compact": Style(compact, refused=False),
    "transcript": Style(transcript),
}
ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a response where a chat template is asked what follows one


class Prompter:
    """States -> token ids, through the tokenizer's chat template where it has one.

    With a context, they are the new ones: what follows the last response, from its end token on if that is not sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: AgentConfig,
        style: str,
        styles: Mapping[str, Style] = STYLES,
    ):
        self.tokenizer, self.config, self.style = tokenizer, config, styles[style]
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, states: list[State]) -> list[tuple[list[int], bool]]:
        """Per state (ids, truncated). A prompt over the limit loses its history, then its observation's tail.

        A context counts with its prompt. What does not fit behind one is cut to the room of the response as well: no
        turn can be played from there, but the state can be valued.
        """
        limit = self.config.max_prompt_tokens
        if not self.style.refused:
            states = [without_refused(state) for state in states]
        prompts = self.encode([replace(state, history=self.recent(state)) for state in states])
        return [
            (ids, False) if len(state.context) + len(ids) <= limit else (self.shorten(state, self.room(state)), True)
            for state, ids in zip(states, prompts, strict=True)
        ]

    def recent(self, state: State) -> list[tuple[str, str]]:
        return state.history[-self.config.history :] if self.config.history else []

    def room(self, state: State) -> int:
        c, used = self.config, len(state.context)
        return max(0, c.max_prompt_tokens + c.max_response_tokens - used) if used else c.max_prompt_tokens

    def encode(self, states: list[State]) -> list[list[int]]:
        prompts = self.tokenize([self.text(state) for state in states])
        return [
            ids[1:] if state.context and ids[0] == state.context[-1] and ids[0] in self.special else ids
            for state, ids in zip(states, prompts, strict=True)
        ]

    def text(self, state: State) -> str:
        text = self.style.render(state)
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.eos_token or ''}\n{text}" if state.context else text
        messages = [{"role": "user", "content": text}]
        if state.context:
            messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}, *messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.partition(ANSWER)[2] if state.context else text

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def shorten(self, state: State, limit: int) -> list[int]:
        bare = replace(state, history=[])
        [ids], [words] = self.encode([bare]), self.tokenize([state.observation])
        while len(ids) > limit and words:  # again and again, for a style may render less than it is given
            words = words[: max(0, len(words) - (len(ids) - limit))]
            [ids] = self.encode([replace(bare, observation=self.tokenizer.decode(words))])
        return ids[max(0, len(ids) - limit) :]
