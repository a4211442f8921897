"""What the networks say of finished episodes, without gradients: values, reference and own log-probs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hiper_fast import estimators
from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config
from hiper_fast.estimators import HIGH, Values
from hiper_fast.learn.rows import Rows, divide, measure_spared
from hiper_fast.packing import BLANK, Microbatch
from hiper_fast.rollout.trajectory import Trajectories


@dataclass(slots=True)
class Scores:
    values: Values | None  # None without a critic
    ref_logprobs: (
        Tensor | None
    )  # float32 [tokens], where a token has a role; None without a KL term
    importance: Tensor | None = None  # float32 [tokens], weights of advantages; None: all are 1
    metrics: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def score(agent: Agent, trajectories: Trajectories, config: Config) -> Scores:
    """One pass of each network. `train.old_logprobs: recomputed` writes trajectories.old_logprobs anew."""
    pass_ = ScoringPass(agent, trajectories, config)
    sequences = trajectories.sequences(final=pass_.bootstraps, token_values=pass_.per_token)
    counts, batches = [], divide(agent, config, sequences.ids, sequences.cu_seqlens)
    for batch in agent.world.deal(batches, BLANK):
        counts.append(batch.counts)
        pass_.read(batch, Rows(sequences, batch, trajectories.roles > 0))
    if pass_.bootstraps and not trajectories.continued:
        finals = divide(agent, config, trajectories.final_ids, trajectories.cu_final)
        for batch in agent.world.deal(finals, BLANK):
            pass_.read_end(batch)
    scores = pass_.finish()
    scores.metrics["scoring/shared_tokens"] = measure_spared(agent.world, counts)
    return scores


class ScoringPass:
    """The scores of some trajectories while they are filled, microbatch by microbatch."""

    def __init__(self, agent: Agent, trajectories: Trajectories, config: Config):
        self.agent, self.trajectories = agent, trajectories
        self.temperature = config.agent.temperature
        self.recomputes = config.train.old_logprobs == "recomputed"
        self.importance_cap = config.train.importance_cap
        asked = config.advantage.bootstrap == "next_state"
        self.bootstraps = asked and agent.critic is not None
        self.per_token = estimators.needs_tokens(estimators.find(config.advantage.estimator))
        places = trajectories.response_ids.numel() if self.per_token else trajectories.turns
        self.values = torch.zeros(places, 3)
        self.bootstrap = torch.zeros(len(trajectories.terminated))
        self.old_logprobs = torch.zeros_like(trajectories.old_logprobs)  # [tokens]
        with_reference = config.train.kl_coef > 0
        self.ref_logprobs = torch.zeros_like(self.old_logprobs) if with_reference else None

    def read(self, batch: Microbatch, rows: Rows) -> None:
        agent, batch = self.agent, batch.to(self.agent.device)
        hidden = agent.trunk(batch) if self.recomputes else None
        if self.recomputes:
            self.old_logprobs[rows.tokens] = self.logprobs(hidden, rows)
        if agent.critic is not None:
            critic_hidden = agent.critic_hidden(batch, hidden)
            values = agent.critic(critic_hidden[rows.value_rows])
            self.values[rows.places] = rows.take_values(values).cpu()
            if self.bootstraps and self.trajectories.continued:
                self.bootstrap[batch.index] = self.last_values(batch, critic_hidden)
        if self.ref_logprobs is not None:
            hidden = agent.trunk(batch, reference=True)
            self.ref_logprobs[rows.tokens] = self.logprobs(hidden, rows, reference=True)

    def read_end(self, batch: Microbatch) -> None:
        """The prompts of the states after the last turns."""
        batch = batch.to(self.agent.device)
        self.bootstrap[batch.index] = self.last_values(batch, self.agent.critic_hidden(batch))

    def logprobs(self, hidden: Tensor, rows: Rows, *, reference: bool = False) -> Tensor:
        targets = self.trajectories.response_ids[rows.tokens].to(self.agent.device)
        rows_hidden = hidden[rows.token_rows]
        return self.agent.logprobs(
            rows_hidden, targets, self.temperature, reference=reference
        ).cpu()

    def last_values(self, batch: Microbatch, hidden: Tensor) -> Tensor:
        """V_high [sequences] at the last token of each sequence."""
        last = hidden[batch.cu_seqlens[1:].long() - 1]
        return self.agent.critic(last)[: len(batch.index), HIGH].cpu()

    def finish(self) -> Scores:
        """The sums over all processes, each of which read its share."""
        trajectories, world, importance = self.trajectories, self.agent.world, None
        if self.recomputes:
            sampled, old = trajectories.old_logprobs, world.sum(self.old_logprobs)
            trajectories.sampled_logprobs = sampled
            trajectories.old_logprobs = torch.where(trajectories.roles > 0, old, sampled)
            if self.importance_cap:
                drift = trajectories.old_logprobs - sampled
                importance = drift.exp().clamp(max=self.importance_cap)
        if self.ref_logprobs is not None:
            world.sum(self.ref_logprobs)
        if self.agent.critic is None:
            return Scores(None, self.ref_logprobs, importance)
        bootstrap = world.sum(self.bootstrap).masked_fill(trajectories.terminated, 0)
        found = world.sum(self.values)
        turns, tokens = (None, found) if self.per_token else (found, None)
        return Scores(Values(turns, bootstrap, tokens), self.ref_logprobs, importance)
