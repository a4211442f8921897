"""One episode being played: the environment, what the agent has seen of it, and its record."""

from __future__ import annotations

from hiper_fast import response
from hiper_fast.config import Config
from hiper_fast.envs.base import Environment, Info
from hiper_fast.envs.family import Family, Task
from hiper_fast.envs.prompts import State
from hiper_fast.rollout.engines import Answer, Request
from hiper_fast.rollout.trajectory import Episode, Turn, key_state
from hiper_fast.text import clean


class Play:
    """An episode between two turns; `see` its prompt, then `step` with what is answered."""

    def __init__(self, env: Environment, task: Task, family: Family, config: Config):
        self.env, self.family, self.config = env, family, config
        observation, info = env.reset(**task)
        sentence, plans = clean(info["task"]), config.agent.subgoals
        self.state = State(sentence, "", [], plans=plans)
        self.take(family.strip_opening(clean(observation)), info)
        reachable = getattr(env, "reachable", True)
        kind = clean(info["task_type"])
        self.episode = Episode(sentence, kind, plans=plans, reachable=reachable)
        self.episode.continued = config.agent.style == "transcript"
        self.over = False

    def take(self, observation: str, info: Info) -> None:
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
    def context(self) -> list[int]:
        """All token ids that the model reads at this turn."""
        return self.state.context or self.episode.prompts[-1]

    def request(self) -> Request:
        conversation = id(self) if self.episode.continued else None
        return Request(list(self.context), conversation)

    def step(self, answer: Answer, text: bytes) -> None:
        """Sends the response's action to the environment and stores the turn."""
        parsed = response.parse(text)
        action = response.command(text, self.config.agent.fallback).lower()
        state, episode, rewards = self.state, self.episode, self.config.reward
        sets = self.config.agent.shown_subgoal == "written" or not episode.responses
        if state.plans and parsed.subgoal and (parsed.switch or sets):
            state.subgoal = parsed.subgoal
        said = text.decode(errors="replace")
        episode.turns.append(Turn(state.observation, said, state.subgoal, action))
        episode.states.append(key_state(state.observation, state.commands))
        is_listed = self.family.is_listed(action.strip(), state.commands)
        episode.near_misses += self.family.is_near_miss(action.strip(), state.commands)
        wording = self.wordings.get(action.strip(), action)  # as the environment has it
        observation, _, terminated, _, info = self.env.step(wording)
        state.history.append((state.observation, action))
        state.sent.add(action.strip())
        self.take(clean(observation).strip(), info)
        episode.responses.append(answer.ids)
        episode.responses_at_limit += len(answer.ids) >= self.config.agent.max_response_tokens
        if episode.continued:
            state.context += answer.ids
        episode.logprobs.append(answer.logprobs)
        reward = 0.0 if is_listed else rewards.inadmissible
        episode.rewards.append(reward + (rewards.success if self.info["won"] else 0.0))
        episode.won, episode.terminated = self.info["won"], terminated
        episode.score = self.info.get("task_score")
        self.over = terminated or len(episode.responses) == self.config.env.max_turns
