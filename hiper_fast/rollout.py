"""Episodes in step: every running episode gets its response from one batch; the finished ones leave it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hiper_fast import response
from hiper_fast.config import Config
from hiper_fast.generate import Past, generate
from hiper_fast.policy import Agent
from hiper_fast.prompt import Prompter, State
from hiper_fast.trajectory import Episode, Trajectories, Turn, pack

Answer = tuple[list[int], list[float]]  # token ids and their log-probs


class Play:
    """One episode being played: the environment, what the agent has seen of it, and its record."""

    def __init__(self, env, task: dict, config: Config):
        self.env, self.config = env, config
        observation, info = env.reset(**task)
        self.info = info
        self.state = State(info["task"], opening(observation), info["admissible_commands"])
        self.episode = Episode(info["task"], info["task_type"], reachable=getattr(env, "reachable", True))
        self.episode.continued = config.agent.style == "transcript"
        self.over = False

    def see(self, prompt: tuple[list[int], bool]) -> None:
        """Stores the turn's prompt. One that no longer fits behind its context ends the episode there."""
        ids, truncated = prompt
        self.over = self.over or (truncated and bool(self.state.context))
        self.episode.prompts.append(ids)
        self.episode.truncated_prompts += truncated
        if self.episode.continued:
            self.state.context += ids

    @property
    def context(self) -> list[int]:
        """All token ids that the model reads at this turn."""
        return self.state.context or self.episode.prompts[-1]

    def step(self, answer: Answer, text: bytes) -> None:
        """Sends the response's action to the environment and stores the turn."""
        parsed = response.parse(text)
        action = response.command(text, self.config.agent.fallback).lower()
        state, episode = self.state, self.episode
        if parsed.subgoal and (parsed.switch or not episode.responses):
            state.subgoal = parsed.subgoal
        episode.turns.append(Turn(state.observation, text.decode(errors="replace"), state.subgoal, action))
        reward = 0.0 if listed(action.strip(), state.commands) else self.config.reward.inadmissible
        observation, _, terminated, _, self.info = self.env.step(action)
        episode.responses.append(answer[0])
        if episode.continued:
            state.context += answer[0]
        episode.logprobs.append(answer[1])
        episode.rewards.append(reward + (self.config.reward.success if self.info["won"] else 0.0))
        episode.won, episode.terminated = self.info["won"], terminated
        episode.score = self.info.get("task_score")
        state.history.append((state.observation, action))
        state.sent.add(action.strip())
        state.observation, state.commands = observation.strip(), self.info["admissible_commands"]
        self.over = terminated or len(episode.responses) == self.config.env.max_turns


def listed(action: str, commands: list[str]) -> bool:
    """Whether `action` is among the commands; `<your query>` in one of them stands for any text."""
    if action in commands:
        return True
    patterns = (c.split("<your query>") for c in commands if "<your query>" in c)
    return any(action.startswith(a) and action.endswith(b) and len(action) > len(a + b) for a, b in patterns)


def opening(observation: str) -> str:
    """The first observation without its banner and task sentence, which the prompt gives in its own place."""
    return observation.split("=-\n\n")[-1].split("\n\nYour task is to:")[0].strip()


def rollout(
    plays: list[Play], prompter: Prompter, respond: Callable[[list[Play]], list[Answer]], decode
) -> list[Episode]:
    """Plays all episodes to their end or the turn limit.

    `respond` maps running plays, each with what it reads in `context`, to answers; `decode` maps ids to bytes. A
    truncated episode ends with the prompt of the state after its last turn, for the bootstrap.
    """

    def see(plays: list[Play]) -> list[Play]:
        for play, prompt in zip(plays, prompter([p.state for p in plays]), strict=True):
            play.see(prompt)
        return [play for play in plays if not play.over]

    running = see(plays)
    while running:
        for play, answer in zip(running, respond(running), strict=True):
            play.step(answer, decode(answer[0]))
        see([play for play in running if play.over and not play.episode.terminated])
        running = see([play for play in running if not play.over])
    return [play.episode for play in plays]


def played(
    agent: Agent, envs: list, tasks: list[dict], prompter: Prompter, config: Config, temperature: float, seed: int
) -> Trajectories:
    """The episodes of `tasks`, packed; of many processes each plays its share, in `envs`, and gets to know them all."""
    world = agent.world
    plays = [Play(env, task, config) for env, task in zip(envs, world.share(tasks), strict=True)]
    respond = sampled(agent, config, temperature, seed + (world.rank << 32))
    with world.whole(agent.model):
        episodes = rollout(plays, prompter, respond, agent.decode)
    return pack(world.gather(episodes), agent.find_roles)


def sampled(agent: Agent, config: Config, temperature: float, seed: int) -> Callable[[list[Play]], list[Answer]]:
    """A `respond` that samples from the policy; the same seed and weights give the same answers.

    Where turns continue each other, it keeps the running episodes' keys and values: a turn reads its new tokens only.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, tuple[list[int], Past]] = {}

    def past(play: Play) -> Past | None:
        ids, past = kept.get(id(play), (None, None))
        return past if play.episode.responses[-1:] == [ids] else None  # a person may have said something else

    def respond(plays: list[Play]) -> list[Answer]:
        continued = any(play.episode.continued for play in plays)
        pasts = [past(play) for play in plays] if continued else None
        kept.clear()  # those of finished episodes go
        with agent.eager():
            answers = generate(
                agent.model,
                [play.context for play in plays],
                max_new_tokens=config.agent.max_response_tokens,
                temperature=temperature,
                stop_ids=agent.stop_ids,
                generator=generator,
                batch_tokens=config.agent.batch_tokens,
                pasts=pasts,
            )
        if continued:
            kept.update({id(play): (ids, past) for play, (ids, _), past in zip(plays, answers, pasts, strict=True)})
        return answers

    return respond


def scores(stage: str, episodes: list[Episode]) -> dict[str, float]:
    """Beside success, for environments that give a score in [0, 1]: its mean, and both over goals that can be met."""
    if any(e.score is None for e in episodes):
        return {}
    reachable = [e for e in episodes if e.reachable]
    return {
        f"{stage}/score": sum(e.score for e in episodes) / len(episodes),
        f"{stage}/reachable": len(reachable) / len(episodes),
        f"{stage}/success_reachable": sum(e.won for e in reachable) / max(1, len(reachable)),
        f"{stage}/score_reachable": sum(e.score for e in reachable) / max(1, len(reachable)),
    }


def summary(t: Trajectories) -> dict[str, float]:
    """What a person wants to know of a batch of episodes, under `rollout/`; rates are per turn, success per episode."""
    episodes, turns = len(t.episodes), t.turns
    first_turns = t.cu_turns[:-1].long()
    segments = t.switch.index_fill(0, first_turns, True).sum().item()
    return {
        "rollout/success": t.won.float().mean().item(),
        **scores("rollout", t.episodes),
        "rollout/reward": t.rewards.sum().item() / episodes,
        "rollout/turns": turns / episodes,
        "rollout/segment_length": turns / segments,
        "rollout/switch_rate": t.switch.float().mean().item(),
        "rollout/valid_rate": t.valid.float().mean().item(),
        "rollout/prompt_tokens": t.prompt_ids.numel() / turns,
        "rollout/response_tokens": t.response_ids.numel() / turns,
        "rollout/truncated_prompts": sum(e.truncated_prompts for e in t.episodes),
    }
