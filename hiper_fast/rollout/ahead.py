"""Rollouts that play while the update before them learns, with weights one update old (`rollout.ahead`)."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config
from hiper_fast.envs.family import Family
from hiper_fast.options import ConfigError
from hiper_fast.rollout.play import Draw, open_rollouts
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.trajectory import Trajectories


def check_ahead(config: Config, processes: int) -> None:
    """ConfigError where nothing would correct for the older weights, or several processes would wait for each other."""
    if not config.rollout.ahead:
        return
    if processes > 1:
        raise ConfigError("rollout.ahead: is for one process; leave it 0 with torchrun")
    if config.model.compile:
        raise ConfigError("rollout.ahead: does not go with model.compile; leave one of them out")
    if config.train.old_logprobs != "recomputed" or not config.train.importance_cap:
        raise ConfigError(
            "rollout.ahead: its episodes are of older weights, which importance weights correct for; add "
            "--train.old_logprobs recomputed --train.importance_cap 2"
        )


class Ahead:
    """`Rollouts` of a copy of the policy, which in a thread of its own may be a rollout ahead."""

    def __init__(self, agent: Agent, family: Family, prompter: Prompter, config: Config):
        self.agent, self.actor = agent, copy.copy(agent)
        self.actor.model = copy.deepcopy(agent.model).eval().requires_grad_(False)
        self.resources = contextlib.ExitStack()
        rollouts = open_rollouts(self.actor, family, prompter, config)
        self.rollouts = self.resources.enter_context(rollouts)
        self.threads = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))
        self.future: Future | None = None

    def play(self, draw: Draw) -> Trajectories:
        """With the weights of now, as `Rollouts.play`; what is being played ahead is finished before."""
        if self.future is not None:
            self.future.exception()
        self.follow()
        return self.rollouts.play(draw)

    def play_on(self, draw: Draw, following: Draw | None) -> Trajectories:
        """What was begun by the last call, or `draw` now; then begins the `following` one."""
        if self.future is None:
            trajectories = self.play(draw)
        else:
            future, self.future = self.future, None
            trajectories = future.result()
            trajectories.updates_behind = 1
        if following is not None:
            self.follow()
            self.future = self.threads.submit(self.rollouts.play, following)
        return trajectories

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the copy the agent's present weights."""
        pairs = zip(self.actor.model.parameters(), self.agent.model.parameters(), strict=True)
        for own, present in pairs:
            own.copy_(present)

    def close(self) -> None:
        """Drops what is being played."""
        self.rollouts.drop()
        self.threads.shutdown()
        self.resources.close()
