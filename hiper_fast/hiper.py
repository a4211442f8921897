"""The algorithm: rewards -> values -> HAE -> token advantages -> PPO and value losses (arXiv 2602.16165)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.batch import Microbatch, microbatches
from hiper_fast.config import AdvantageConfig, Config, RewardConfig
from hiper_fast.policy import Agent
from hiper_fast.trajectory import Trajectories

LOW, HIGH, SWITCH = range(3)  # columns of values, returns and value positions


@dataclass(slots=True)
class Targets:
    """What an update learns from; fixed while it runs."""

    advantages: Tensor  # float32 [tokens]
    loss_mask: Tensor  # bool [tokens]
    ref_logprobs: Tensor | None  # float32 [tokens], where loss_mask; None without a KL term
    old_values: Tensor  # float32 [turns, 3]
    returns: Tensor  # float32 [turns, 3]
    value_mask: Tensor  # bool [turns, 3]: which turns train which head
    levels: ops.HAE  # per turn, for the report


def shape_rewards(trajectories: Trajectories, config: RewardConfig) -> Tensor:
    """Environment rewards plus penalties for invalid, KEEP and inconsistent KEEP turns; float32 [turns].

    A KEEP turn is one whose response did not switch. `normalized` puts keep * (KEEP turns / T) / (KEEP turns) on
    each and skips episodes of one turn; `fixed` puts keep. Consistency compares the subgoal's token ids, tags
    included, with those of the turn before.
    """
    t = trajectories
    rewards = t.rewards + config.invalid * ~t.valid
    if config.keep:
        lengths = t.cu_turns.diff().long().repeat_interleave(t.cu_turns.diff())
        penalty = (
            torch.where(lengths > 1, config.keep / lengths, 0.0) if config.keep_mode == "normalized" else config.keep
        )
        rewards = rewards + penalty * ~t.switch
    if config.consistency:
        starts = set(t.cu_turns.tolist())
        is_subgoal = (t.roles & ops.reference.SUBGOAL) > 0
        bounds = t.cu_tokens.tolist()
        subgoals = [t.response_ids[a:b][is_subgoal[a:b]] for a, b in zip(bounds, bounds[1:], strict=False)]
        for turn in (~t.switch).nonzero()[:, 0].tolist():
            if turn not in starts and len(subgoals[turn]) and len(subgoals[turn - 1]):
                if not torch.equal(subgoals[turn], subgoals[turn - 1]):
                    rewards[turn] += config.consistency
    return rewards


def train_malformed(t: Trajectories) -> None:
    """Gives the tokens outside every block of an invalid turn the action's role.

    Else nothing teaches a policy not to sample them again: a block counts only with both its tags.
    """
    stray = (t.roles == 0) & ~t.valid.repeat_interleave(t.cu_tokens.diff())
    t.roles = t.roles.masked_fill(stray, ops.reference.ACTION)


@torch.no_grad()
def score(agent: Agent, t: Trajectories, config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without gradients: values [turns, 3], bootstrap V_high [trajectories] (0: terminated), ref log-probs [tokens]."""
    values = torch.zeros(t.turns, 3)
    ref_logprobs = torch.zeros_like(t.old_logprobs) if config.train.kl_coef else None
    for batch in microbatches(*t.sequences(), config.train.microbatch_tokens):
        rows = Rows(t, batch, t.roles > 0)
        ids = batch.input_ids.to(agent.device)
        values[batch.index] = rows.values(agent.critic(rows.at_values(agent.critic_hidden(ids)))).cpu()
        if ref_logprobs is not None and rows.tokens.numel():
            hidden = rows.at_tokens(agent.trunk(ids, reference=True))
            targets = t.response_ids[rows.tokens].to(agent.device)
            ref_logprobs[rows.tokens] = agent.logprobs(hidden, targets, config.agent.temperature, reference=True).cpu()
    bootstrap = torch.zeros(len(t.terminated))
    if config.advantage.bootstrap and t.final_ids.numel():
        for batch in microbatches(t.final_ids, t.cu_final, config.train.microbatch_tokens):
            hidden = agent.critic_hidden(batch.input_ids.to(agent.device))
            last = hidden[torch.arange(len(batch.index)), batch.lengths - 1]
            bootstrap[batch.index] = agent.critic(last)[:, HIGH].cpu()
    return values, bootstrap, ref_logprobs


class Rows:
    """Where a microbatch's hidden states predict loss tokens and values: (sequence, position) pairs."""

    def __init__(self, t: Trajectories, batch: Microbatch, loss_mask: Tensor):
        prompts = t.cu_prompts.diff()[batch.index].long()
        starts, lengths = t.cu_tokens[batch.index].long(), t.cu_tokens.diff()[batch.index].long()
        sequence = torch.arange(len(batch.index)).repeat_interleave(lengths)
        offset = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        tokens = starts[sequence] + offset
        kept = loss_mask[tokens]
        self.tokens = tokens[kept]  # [rows] index into the batch's response tokens
        self.token_rows = sequence[kept], (prompts[sequence] - 1 + offset)[kept]
        positions = prompts[:, None] - 1 + t.value_index[batch.index]
        self.value_rows = torch.arange(len(batch.index))[:, None].expand(-1, 3), positions

    def at_tokens(self, hidden: Tensor) -> Tensor:
        """[sequences, length, h] -> [rows, h]."""
        return hidden[self.token_rows]

    def at_values(self, hidden: Tensor) -> Tensor:
        """[sequences, length, h] -> [sequences, 3, h]."""
        return hidden[self.value_rows]

    def values(self, values: Tensor) -> Tensor:
        """Each head at its own position: [sequences, 3 positions, 3 heads] -> [sequences, 3]."""
        return values.diagonal(dim1=1, dim2=2)


def estimate(
    t: Trajectories, values: Tensor, bootstrap: Tensor, ref_logprobs: Tensor | None, config: AdvantageConfig
) -> Targets:
    """Values -> advantages -> token advantages. A truncated episode's low level bootstraps like a segment's end."""
    low, high, switch = values.unbind(1)
    if config.estimator == "hae":
        levels = ops.hae(
            t.rewards, low, high, t.switch, t.terminated, t.cu_turns,
            values_switch=switch, bootstrap_low=bootstrap, bootstrap_high=bootstrap,
            gamma=config.gamma, lambda_turn=config.lambda_turn, lambda_segment=config.lambda_segment,
        )  # fmt: skip
        every = torch.ones_like(levels.boundary)
        value_mask = torch.stack([every, levels.boundary, every], 1)
    else:
        advantages, returns = ops.gae(
            t.rewards, high, t.terminated, t.cu_turns,
            bootstrap=bootstrap, gamma=config.gamma, lambda_=config.lambda_segment,
        )  # fmt: skip
        every = torch.ones_like(t.switch)
        levels = ops.HAE(advantages, returns, advantages, returns, advantages, returns, every)
        value_mask = torch.stack([~every, every, ~every], 1)
    returns = torch.stack([levels.returns_low, levels.returns_high, levels.returns_switch], 1)
    if config.normalize:
        levels = levels._replace(
            advantages_low=ops.normalize(levels.advantages_low, carries(t, ops.reference.ACTION)),
            advantages_high=ops.normalize(levels.advantages_high, levels.boundary & carries(t, ops.reference.SUBGOAL)),
            advantages_switch=ops.normalize(levels.advantages_switch, carries(t, ops.reference.SWITCH)),
        )
    if config.estimator == "hae":
        advantages, loss_mask = ops.scatter_advantages(levels, t.roles, t.cu_tokens)
    else:
        loss_mask = t.roles > 0
        advantages = levels.advantages_low.repeat_interleave(t.cu_tokens.diff()) * loss_mask
    return Targets(advantages, loss_mask, ref_logprobs, values, returns, value_mask, levels)


def carries(t: Trajectories, role: int) -> Tensor:
    """bool [turns]: the turn has a token of that role."""
    turn_of_token = torch.arange(t.turns).repeat_interleave(t.cu_tokens.diff())
    return torch.zeros(t.turns, dtype=torch.bool).index_fill_(0, turn_of_token[(t.roles & role) > 0], True)


def update(
    agent: Agent,
    optimizers: dict[str, torch.optim.Optimizer],
    t: Trajectories,
    targets: Targets,
    config: Config,
    generator: torch.Generator,
    *,
    train_policy: bool = True,
) -> dict[str, float]:
    """One pass over the turns in random minibatches, an optimiser step each; returns means over the steps."""
    order = torch.randperm(t.turns, generator=generator)
    steps = [
        step(agent, optimizers, t, targets, part, config, train_policy)
        for part in order.tensor_split(config.train.minibatches)
        if part.numel()
    ]
    done = [s for s in steps if s is not None]
    metrics = {key: math.fsum(s[key] for s in done) / len(done) for key in (done[0] if done else {})}
    return metrics | explained_variance(targets) | {"optim/skipped_steps": len(steps) - len(done)}


def explained_variance(targets: Targets) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns) of each level that has values: 1 is a perfect critic, 0 a constant."""
    metrics = {}
    for head, name in ((LOW, "low"), (HIGH, "high"), (SWITCH, "switch")):
        mask = targets.value_mask[:, head]
        if mask.any():
            returns, values = targets.returns[mask, head], targets.old_values[mask, head]
            spread = returns.var(unbiased=False).item()
            left = (returns - values).var(unbiased=False).item()
            metrics[f"value/explained_{name}"] = 1 - left / spread if spread > 0 and math.isfinite(left) else 0.0
    return metrics


def step(agent, optimizers, t: Trajectories, targets: Targets, index: Tensor, config: Config, train_policy: bool):
    """Gradients of one minibatch's loss, gathered over microbatches, and the step; None if anything was not finite."""
    c = config.train
    chosen = torch.zeros(t.turns, dtype=torch.bool).index_fill_(0, index, True)
    tokens = int((targets.loss_mask & chosen.repeat_interleave(t.cu_tokens.diff())).sum())
    counts = (targets.value_mask & chosen[:, None]).sum(0).tolist()
    metrics = dict.fromkeys(("loss/policy", "loss/value", "loss/kl", "loss/entropy", "loss/clip_fraction"), 0.0)
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    ids, cu_seqlens = t.sequences()
    for batch in microbatches(ids, cu_seqlens, c.microbatch_tokens, index):
        rows = Rows(t, batch, targets.loss_mask)
        input_ids = batch.input_ids.to(agent.device)
        loss = torch.zeros((), device=agent.device)
        hidden = None
        if train_policy and rows.tokens.numel():
            hidden = agent.trunk(input_ids)
            policy_loss, parts = policy_terms(agent, rows, rows.at_tokens(hidden), t, targets, config, tokens)
            loss = loss + policy_loss
            for key, value in parts.items():
                metrics[f"loss/{key}"] += value
        values = rows.values(agent.critic(rows.at_values(agent.critic_hidden(input_ids, hidden))))
        for head in (LOW, HIGH, SWITCH):
            if counts[head]:
                columns = (
                    x[batch.index, head].to(agent.device)
                    for x in (targets.old_values, targets.returns, targets.value_mask)
                )
                head_loss, _ = ops.value_loss(values[:, head], *columns, clip=c.value_clip, denominator=counts[head])
                loss = loss + c.value_coef[head] * head_loss
                metrics["loss/value"] += c.value_coef[head] * head_loss.item()
        loss.backward()
    norms = {
        name: torch.nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], c.grad_clip or math.inf)
        for name, o in optimizers.items()
    }
    metrics |= {"optim/grad_norm": float(norms["policy"]), "optim/critic_grad_norm": float(norms["critic"])}
    if not all(math.isfinite(v) for v in metrics.values()):
        return None
    for name, optimizer in optimizers.items():
        if train_policy or name == "critic":
            optimizer.step()
    return metrics


def policy_terms(
    agent, rows: Rows, hidden: Tensor, t: Trajectories, targets: Targets, config: Config, denominator: int
):
    """The policy loss of one microbatch's loss rows and its parts, as shares of the minibatch's token mean."""
    c = config.train

    def take(x):
        return None if x is None else x[rows.tokens].to(agent.device)

    logprobs, entropy = agent.logprobs(hidden, take(t.response_ids), config.agent.temperature, entropy=True)
    loss, metrics = ops.ppo_loss(
        logprobs, take(t.old_logprobs), take(targets.advantages), take(targets.loss_mask),
        ref_logprobs=take(targets.ref_logprobs), entropy=entropy, clip_low=c.clip_low,
        clip_high=c.clip_high, dual_clip=c.dual_clip, kl_coef=c.kl_coef,
        entropy_coef=c.entropy_coef, denominator=denominator,
    )  # fmt: skip
    return loss, {"policy": loss.item()} | {
        k: metrics[k].item() for k in ("kl", "entropy", "clip_fraction") if k in metrics
    }
