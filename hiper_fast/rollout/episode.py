"""One episode being played: the environment, what the agent has seen of it, and its record."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hiper_fast import response
from hiper_fast.config import Config
from hiper_fast.envs.base import Environment, Info
from hiper_fast.envs.family import Family, Task
from hiper_fast.envs.prompts import State
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.trajectory import Episode, Turn, key_state
from hiper_fast.rollout.workers import Worker
from hiper_fast.text import clean


class Wanted:
    """What an episode waits for. To await it is to let others go on until it is there."""

    __slots__ = ()

    def __await__(self) -> Generator[Wanted, Any, Any]:
        return (yield self)


class PromptWanted(Wanted):
    """(ids, truncated): the prompt of the play's state."""


class ResponseWanted(Wanted):
    """(answer, text): the response to what the play has read."""


@dataclass(frozen=True, slots=True)
class CallWanted(Wanted):
    """What a method of the environment returns."""

    name: Literal["reset", "step"]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Play:
    """An episode and how it goes on: by `run`, or turn by turn from `begin` on, `see` its prompt and `step`."""

    def __init__(
        self,
        env: Environment | Worker | None,
        task: Task,
        family: Family,
        config: Config,
        number: int = 0,
    ):
        """env: None, if it comes later; number: the play's own among those that are played together."""
        self.env, self.task, self.family, self.config = env, task, family, config
        self.number = number
        self.over = False
        self.state: State | None = None  # None before the first observation
        self.episode: Episode | None = None

    async def run(self) -> None:
        """To the end or the turn limit; one cut off there ends with the prompt of the state after its last turn."""
        if self.state is None:
            self.open(*await CallWanted("reset", kwargs=self.task))
        self.see(*await PromptWanted())
        while not self.over:
            action = self.read(*await ResponseWanted())
            self.take(*await CallWanted("step", (action,)))
            if not self.episode.terminated:
                self.see(*await PromptWanted())

    def begin(self) -> Play:
        """The first observation; the play itself."""
        self.open(*self.env.reset(**self.task))
        return self

    def open(self, observation: str, info: Info) -> None:
        sentence, plans = clean(info["task"]), self.config.agent.subgoals
        self.state = State(sentence, "", [], plans=plans)
        self.show(self.family.strip_opening(clean(observation)), info)
        reachable = getattr(self.env, "reachable", True)
        kind = clean(info["task_type"])
        self.episode = Episode(sentence, kind, plans=plans, reachable=reachable)
        self.episode.continued = self.config.agent.style == "transcript"

    def show(self, observation: str, info: Info) -> None:
        """What the agent reads from now on: clean, whatever stands in the environment's texts."""
        self.info = info
        self.wordings = {clean(command): command for command in info["admissible_commands"]}
        self.state.observation, self.state.commands = observation, list(self.wordings)

    def see(self, ids: list[int], truncated: bool) -> None:
        """Stores the turn's prompt. One that no longer fits behind its context ends the episode."""
        self.over = self.over or (truncated and bool(self.state.context))
        self.episode.prompts.append(ids)
        self.episode.truncated_prompts += truncated
        if self.episode.continued:
            self.state.context += ids

    @property
    def turn(self) -> int:
        return len(self.episode.responses)

    @property
    def context(self) -> list[int]:
        """All token ids that the model reads at this turn."""
        return self.state.context or self.episode.prompts[-1]

    def step(self, answer: Answer, text: bytes) -> None:
        """Sends the response's action to the environment and stores the turn."""
        self.take(*self.env.step(self.read(answer, text)))

    def read(self, answer: Answer, text: bytes) -> str:
        """Stores a response; the command that it sends, as the environment has it."""
        parsed = response.parse(text)
        action = response.command(text, self.config.agent.fallback).lower()
        state, episode = self.state, self.episode
        sets = self.config.agent.shown_subgoal == "written" or not episode.responses
        if state.plans and parsed.subgoal and (parsed.switch or sets):
            state.subgoal = parsed.subgoal
        said = text.decode(errors="replace")
        episode.turns.append(Turn(state.observation, said, state.subgoal, action))
        episode.states.append(key_state(state.observation, state.commands))
        is_listed = self.family.is_listed(action.strip(), state.commands)
        episode.near_misses += self.family.is_near_miss(action.strip(), state.commands)
        episode.rewards.append(0.0 if is_listed else self.config.reward.inadmissible)
        episode.responses.append(answer.ids)
        episode.responses_at_limit += len(answer.ids) >= self.config.agent.max_response_tokens
        episode.logprobs.append(answer.logprobs)
        if episode.continued:
            state.context += answer.ids
        state.history.append((state.observation, action))
        state.sent.add(action.strip())
        return self.wordings.get(action.strip(), action)

    def take(
        self, observation: str, _reward: float, terminated: bool, truncated: bool, info: Info
    ) -> None:
        """Stores what the environment made of it."""
        episode = self.episode
        self.show(clean(observation).strip(), info)
        episode.rewards[-1] += self.config.reward.success if info["won"] else 0.0
        episode.won, episode.terminated = info["won"], terminated
        episode.score = info.get("task_score")
        self.over = terminated or truncated or self.turn == self.config.env.max_turns
