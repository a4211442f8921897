"""The update: random minibatches, an optimiser step each, of policy and value losses (arXiv 2602.16165)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from hiper_fast import ops
from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config, TrainConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH
from hiper_fast.learn.credit import Targets
from hiper_fast.learn.fidelity import measure_fidelity
from hiper_fast.learn.loss import Counts, LossTokens, policy_loss
from hiper_fast.learn.roles import measure_roles
from hiper_fast.learn.rows import Rows, divide, measure_spared
from hiper_fast.packing import BLANK, Microbatch, find_ranges, locate, ranges
from hiper_fast.rollout.trajectory import Sequences, Trajectories

HEADS = {LOW: "low", HIGH: "high", SWITCH: "switch"}


def update(
    agent: Agent,
    optimizers: dict[str, Optimizer],
    trajectories: Trajectories,
    targets: Targets,
    config: Config,
    generator: torch.Generator,
    *,
    train_policy: bool = True,
) -> dict[str, float]:
    """One pass over the sequences, turns or whole trajectories; returns means over the steps."""
    sequences = trajectories.sequences(token_values=targets.per_token)
    order = shuffle(trajectories, sequences, config.train, generator)
    seen, steps, fidelity = Seen.nothing(trajectories, agent.device), [], {}
    for index in split_minibatches(order, config.train):
        if index.numel():
            step = Step(agent, trajectories, sequences, targets, index, config, train_policy, seen)
            steps.append(step.take(optimizers))
            if len(steps) == 1:  # whose log-probs are of the weights that sampled
                fidelity = measure_fidelity(trajectories, seen.log_ratio.cpu(), config, agent.world)
    for optimizer in optimizers.values():
        optimizer.zero_grad()  # the next rollout has a use for the gradients' memory
    taken = [metrics for metrics in steps if metrics is not None]
    names = taken[0] if taken else {}
    means = {name: math.fsum(metrics[name] for metrics in taken) / len(taken) for name in names}
    means |= fidelity | measure_roles(trajectories, targets, seen.clipped.cpu(), agent.world)
    return means | measure_critic(targets) | {"optim/skipped_steps": len(steps) - len(taken)}


def shuffle(
    trajectories: Trajectories,
    sequences: Sequences,
    config: TrainConfig,
    generator: torch.Generator,
) -> Tensor:
    """int64 [sequences]: the order in which minibatches take them, as `train.shuffle` says."""
    if config.shuffle == "turns" or trajectories.continued:
        return torch.randperm(len(sequences), generator=generator)
    cu_turns = trajectories.cu_turns
    return ranges(*locate(cu_turns, torch.randperm(len(cu_turns) - 1, generator=generator)))


def split_minibatches(order: Tensor, config: TrainConfig) -> tuple[Tensor, ...]:
    """`train.minibatches` of about one size, or as many as `train.minibatch_size` makes, the last one short."""
    if config.minibatch_size:
        return order.split(config.minibatch_size)
    return order.tensor_split(config.minibatches)


def measure_critic(targets: Targets) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns) of each head that learns: 1 is perfect, 0 a constant."""
    metrics = {}
    for head, name in HEADS.items() if targets.value_mask is not None else ():
        mask = targets.value_mask[:, head]
        if mask.any():
            returns, values = targets.returns[mask, head], targets.old_values[mask, head]
            spread = returns.var(unbiased=False).item()
            left = (returns - values).var(unbiased=False).item()
            known = spread > 0 and math.isfinite(left)
            metrics[f"value/explained_{name}"] = 1 - left / spread if known else 0.0
    return metrics


@dataclass(slots=True)
class Seen:
    """What the steps of an update find of each loss token, on the agent's device; NaN until they meet it."""

    clipped: Tensor  # float32 [tokens], 1 where the loss clipped its ratio, else 0
    log_ratio: Tensor  # float32 [tokens], logprobs - old_logprobs

    @classmethod
    def nothing(cls, trajectories: Trajectories, device: torch.device) -> Seen:
        unknown = torch.full_like(trajectories.old_logprobs, math.nan, device=device)
        return cls(unknown, unknown.clone())


class Step:
    """One minibatch: its gradients, gathered over microbatches, and the optimiser step.

    Every microbatch divides by what the minibatch holds, in all processes, so that uneven ones add up
    to the whole.
    """

    def __init__(
        self,
        agent: Agent,
        trajectories: Trajectories,
        sequences: Sequences,
        targets: Targets,
        index: Tensor,
        config: Config,
        train_policy: bool,
        seen: Seen,
    ):
        self.agent, self.trajectories, self.targets = agent, trajectories, targets
        self.config, self.train_policy = config, train_policy
        self.seen = seen
        world = agent.world
        whole = divide(agent, config, sequences.ids, sequences.cu_seqlens, index)
        self.batches = [
            (batch.to(agent.device), Rows(sequences, batch, targets.loss_mask))
            for batch in world.deal(whole, BLANK)
        ]
        self.counts = self.count(index)
        spared = measure_spared(world, [batch.counts for batch, _ in self.batches])
        self.value_counts = [0, 0, 0]  # values that train each head
        if agent.critic is not None:
            counts = sum(targets.value_mask[rows.places].sum(0) for _, rows in self.batches)
            self.value_counts = world.sum(counts).tolist()
        names = ["loss/policy", "loss/value", "loss/kl", "loss/clip_fraction"]
        names += ["loss/entropy"] if config.train.entropy_coef else []  # else none is computed
        # On the device until the step's end: the host runs ahead of a GPU, and would wait for each number.
        zeros = torch.zeros(len(names), dtype=torch.float64, device=agent.device)
        self.metrics = dict(zip(names, zeros, strict=True))
        self.told = {"update/shared_tokens": spared}

    def count(self, index: Tensor) -> Counts:
        """What the minibatch of the sequences `index` holds."""
        config = self.config
        held = [[len(rows.tokens), len(rows.sequences.unique())] for _, rows in self.batches]
        tokens, trained = self.agent.world.sum(torch.tensor(held).sum(0)).tolist()
        turns = config.env.max_turns if self.trajectories.continued else 1
        return Counts(tokens, trained, len(index), turns * config.agent.max_response_tokens)

    def take(self, optimizers: dict[str, Optimizer]) -> dict[str, float] | None:
        """The step's metrics; None, and no step, if anything was not finite."""
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for batch, rows in self.batches:
            self.add_gradients(batch, rows)
        sums = self.agent.world.sum(torch.stack([*self.metrics.values()]).cpu())
        metrics = dict(zip(self.metrics, sums.tolist(), strict=True)) | self.told
        limit = self.config.train.grad_clip or math.inf
        for name, optimizer in optimizers.items():
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            key = "optim/grad_norm" if name == "policy" else f"optim/{name}_grad_norm"
            metrics[key] = float(clip_grad_norm_(weights, limit))
        if not all(math.isfinite(value) for value in metrics.values()):
            return None
        for name, optimizer in optimizers.items():
            if self.train_policy or name == "critic":
                optimizer.step()
        return metrics

    def add_gradients(self, batch: Microbatch, rows: Rows) -> None:
        """Those of one microbatch's share of the loss."""
        agent, critic = self.agent, self.agent.critic
        loss, hidden = torch.zeros((), device=agent.device), None
        if self.train_policy and self.counts.tokens:
            hidden = agent.trunk(batch)
            loss = self.policy_loss(hidden[rows.token_rows], rows)
            if critic is None or critic.trunk is not None:
                # What one trunk keeps may go before the other's comes.
                loss.backward()
                loss, hidden = torch.zeros_like(loss), None
        if critic is None:
            return
        # A shared trunk stays as it is while the critic trains alone.
        with torch.set_grad_enabled(self.train_policy or critic.trunk is not None):
            critic_hidden = agent.critic_hidden(batch, hidden)
        values = rows.take_values(critic(critic_hidden[rows.value_rows]))  # [places, 3]
        (loss + self.value_loss(values, rows.places)).backward()

    def policy_loss(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Of the loss tokens [n] of `rows`, predicted by hidden states [n, h]; 0-d."""
        tokens, seen = self.take_tokens(rows), self.seen
        found = policy_loss(self.agent, hidden, tokens, self.counts, self.config)
        self.metrics["loss/policy"] += found.value.detach()
        for name, part in found.metrics.items():
            self.metrics[f"loss/{name}"] += part
        places = rows.tokens.to(seen.clipped.device)
        seen.clipped[places] = found.clipped.to(seen.clipped)
        seen.log_ratio[places] = found.log_ratio.to(seen.log_ratio)
        return found.value

    def take_tokens(self, rows: Rows) -> LossTokens:
        """The loss tokens of `rows`, on the agent's device."""
        trajectories, targets, device = self.trajectories, self.targets, self.agent.device
        data = trajectories.response_ids, trajectories.old_logprobs, targets.advantages
        ids, old_logprobs, advantages = (x[rows.tokens].to(device) for x in data)
        ref = targets.ref_logprobs
        return LossTokens(
            ids,
            old_logprobs,
            advantages,
            ref_logprobs=None if ref is None else ref[rows.tokens].to(device),
            turn=find_ranges(rows.tokens, trajectories.cu_tokens).to(device),
            sequence=rows.sequences.to(device),
        )

    def value_loss(self, values: Tensor, places: Tensor) -> Tensor:
        """Of the values [places, 3] at `places`, each head over what trains it; 0-d."""
        options, targets = self.config.train, self.targets
        total = torch.zeros((), device=values.device)
        for head, count in enumerate(self.value_counts):
            if count:
                data = targets.old_values, targets.returns, targets.value_mask
                columns = (x[places, head].to(values.device) for x in data)
                loss, _ = ops.value_loss(
                    values[:, head], *columns, clip=options.value_clip, denominator=count
                )
                total = total + options.value_coef[head] * loss
                self.metrics["loss/value"] += options.value_coef[head] * loss.detach().double()
        return total
