"""The algorithm: rewards -> values -> HAE -> token advantages -> PPO and value losses (arXiv 2602.16165)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.batch import BLANK, Microbatch, microbatches
from hiper_fast.config import AdvantageConfig, Config, RewardConfig
from hiper_fast.policy import Agent
from hiper_fast.trajectory import Sequences, Trajectories, ranges, spread

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

    Else nothing teaches a policy not to sample them again: a block counts only with both its tags. What they are
    measured against is `estimate`'s concern.
    """
    stray = (t.roles == 0) & ~t.valid.repeat_interleave(t.cu_tokens.diff())
    t.roles = t.roles.masked_fill(stray, ops.reference.ACTION)


@torch.no_grad()
def score(agent: Agent, t: Trajectories, config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without gradients: values [turns, 3], bootstrap V_high [trajectories] (0: terminated), ref log-probs [tokens].

    With `train.old_logprobs: recomputed` the same pass also writes `t.old_logprobs` anew.
    """
    c = config.train
    recompute = c.old_logprobs == "recomputed"
    values = torch.zeros(t.turns, 3)
    ref_logprobs = torch.zeros_like(t.old_logprobs) if c.kl_coef else None
    old_logprobs = torch.zeros_like(t.old_logprobs)
    bootstrap = torch.zeros(len(t.terminated))
    sequences, world = t.sequences(final=config.advantage.bootstrap), agent.world

    def logprobs(hidden: Tensor, rows: Rows, **which) -> Tensor:
        targets = t.response_ids[rows.tokens].to(agent.device)
        return agent.logprobs(hidden[rows.token_rows], targets, config.agent.temperature, **which).cpu()

    for batch in world.deal(microbatches(sequences.ids, sequences.cu_seqlens, c.microbatch_tokens), BLANK):
        rows = Rows(sequences, batch, t.roles > 0)
        batch = batch.to(agent.device)
        hidden = agent.trunk(batch) if recompute else None
        if recompute:
            old_logprobs[rows.tokens] = logprobs(hidden, rows)
        critic_hidden = agent.critic_hidden(batch, hidden)
        values[rows.turns] = rows.values(agent.critic(critic_hidden[rows.value_rows])).cpu()
        if config.advantage.bootstrap and t.continued:
            bootstrap[batch.index] = last_values(agent, batch, critic_hidden)
        if ref_logprobs is not None:
            ref_logprobs[rows.tokens] = logprobs(agent.trunk(batch, reference=True), rows, reference=True)
    if config.advantage.bootstrap and not t.continued:
        for batch in world.deal(microbatches(t.final_ids, t.cu_final, c.microbatch_tokens), BLANK):
            batch = batch.to(agent.device)
            bootstrap[batch.index] = last_values(agent, batch, agent.critic_hidden(batch))
    if recompute:
        t.old_logprobs = torch.where(t.roles > 0, world.sum(old_logprobs), t.old_logprobs)
    if ref_logprobs is not None:
        world.sum(ref_logprobs)
    return world.sum(values), world.sum(bootstrap).masked_fill(t.terminated, 0), ref_logprobs


def last_values(agent: Agent, batch: Microbatch, hidden: Tensor) -> Tensor:
    """V_high [sequences] at the last token of each sequence."""
    return agent.critic(hidden[batch.cu_seqlens[1:].long() - 1])[: len(batch.index), HIGH].cpu()


class Rows:
    """Which rows of a microbatch's hidden states predict its loss tokens and give its values."""

    def __init__(self, sequences: Sequences, batch: Microbatch, loss_mask: Tensor):
        tokens, shift = within(sequences, batch, sequences.token_index)
        kept = loss_mask[tokens]
        self.tokens = tokens[kept]  # [rows] which response tokens
        self.token_rows = (sequences.token_index[tokens] + shift)[kept] - 1
        self.turns, shift = within(sequences, batch, sequences.value_index[:, HIGH])
        self.value_rows = sequences.value_index[self.turns] + shift[:, None]  # [turns, 3]

    @staticmethod
    def values(values: Tensor) -> Tensor:
        """Each head at its own position: [turns, 3 positions, 3 heads] -> [turns, 3]."""
        return values.diagonal(dim1=1, dim2=2)


def within(sequences: Sequences, batch: Microbatch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the ascending `positions` lie in the batch's sequences; for each, what takes it to its row there."""
    edges = torch.searchsorted(positions.contiguous(), sequences.cu_seqlens.long())
    counts = edges.diff()[batch.index]
    shift = batch.cu_seqlens[:-1] - sequences.cu_seqlens[batch.index]
    return ranges(edges[batch.index], counts), shift.long().repeat_interleave(counts)


def estimate(
    t: Trajectories, values: Tensor, bootstrap: Tensor, ref_logprobs: Tensor | None, config: AdvantageConfig
) -> Targets:
    """Values -> advantages -> token advantages. A truncated episode's low level bootstraps like a segment's end.

    V_low stands behind the subgoal. Of a turn without that block it would know that the turn has failed already, and
    its tokens would look no worse than any: with `advantage.malformed` such a turn is measured against V_switch, which
    knows only the prompt, and V_low does not learn from it.
    """
    low, high, switch = values.unbind(1)
    if config.estimator == "hae":
        named = has_role(t, ops.reference.SUBGOAL) | (not config.malformed)
        levels = ops.hae(
            t.rewards, torch.where(named, low, switch), high, t.switch, t.terminated, t.cu_turns,
            values_switch=switch, bootstrap_low=bootstrap, bootstrap_high=bootstrap,
            gamma=config.gamma, lambda_turn=config.lambda_turn, lambda_segment=config.lambda_segment,
        )  # fmt: skip
        value_mask = torch.stack([named, levels.boundary, torch.ones_like(named)], 1)
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
        advantages, loss_mask, levels = ops.normalize_and_scatter(levels, t.roles, t.cu_tokens)
    else:
        advantages, loss_mask = ops.scatter_advantages(levels, t.roles, t.cu_tokens)
    if config.estimator == "gae":  # one level: a token of several roles takes its advantage once
        advantages = levels.advantages_low.repeat_interleave(t.cu_tokens.diff()) * loss_mask
    return Targets(advantages, loss_mask, ref_logprobs, values, returns, value_mask, levels)


def has_role(t: Trajectories, role: int) -> Tensor:
    """bool [turns]: whether any token of the turn has it."""
    turn = spread(torch.arange(t.turns), t.cu_tokens)
    return torch.zeros(t.turns, dtype=torch.bool).index_fill(0, turn[(t.roles & role) > 0], True)


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
    """One pass over the sequences, turns or whole trajectories, in random minibatches, an optimiser step each; returns
    means over the steps."""
    sequences = t.sequences()
    order = torch.randperm(len(sequences), generator=generator)
    steps = [
        step(agent, optimizers, t, sequences, targets, part, config, train_policy)
        for part in order.tensor_split(config.train.minibatches)
        if part.numel()
    ]
    for optimizer in optimizers.values():
        optimizer.zero_grad()  # the next rollout has a use for the gradients' memory
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


def step(
    agent: Agent, optimizers, t: Trajectories, sequences: Sequences, targets: Targets, index: Tensor, config: Config,
    train_policy: bool,
):  # fmt: skip
    """Gradients of one minibatch's loss, gathered over microbatches, and the step; None if anything was not finite.

    Every microbatch divides by the minibatch's loss tokens and values, those of all processes, so that uneven ones add
    up to the whole.
    """
    c, world = config.train, agent.world
    whole = microbatches(sequences.ids, sequences.cu_seqlens, c.microbatch_tokens, index)
    batches = [
        (batch.to(agent.device), Rows(sequences, batch, targets.loss_mask)) for batch in world.deal(whole, BLANK)
    ]
    tokens = world.sum(torch.tensor(sum(rows.tokens.numel() for _, rows in batches))).item()
    counts = world.sum(sum(targets.value_mask[rows.turns].sum(0) for _, rows in batches)).tolist()
    metrics = dict.fromkeys(("loss/policy", "loss/value", "loss/kl", "loss/clip_fraction"), 0.0)
    if c.entropy_coef:  # else no entropy is computed
        metrics["loss/entropy"] = 0.0
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    for batch, rows in batches:
        loss = torch.zeros((), device=agent.device)
        hidden = None
        if train_policy and tokens:
            hidden = agent.trunk(batch)
            loss, parts = policy_loss(agent, hidden[rows.token_rows], rows.tokens, t, targets, config, tokens)
            for key, value in parts.items():
                metrics[f"loss/{key}"] += value
            if agent.critic.trunk is not None:  # what one trunk keeps may go before the other's comes
                loss.backward()
                loss, hidden = torch.zeros_like(loss), None
        with torch.set_grad_enabled(train_policy or agent.critic.trunk is not None):  # else a shared trunk stays
            critic_hidden = agent.critic_hidden(batch, hidden)
        values = rows.values(agent.critic(critic_hidden[rows.value_rows]))
        for head in (LOW, HIGH, SWITCH):
            if counts[head]:
                columns = (
                    x[rows.turns, head].to(agent.device)
                    for x in (targets.old_values, targets.returns, targets.value_mask)
                )
                head_loss, _ = ops.value_loss(values[:, head], *columns, clip=c.value_clip, denominator=counts[head])
                loss = loss + c.value_coef[head] * head_loss
                metrics["loss/value"] += c.value_coef[head] * head_loss.item()
        loss.backward()
    sums = world.sum(torch.tensor([*metrics.values()], dtype=torch.float64))
    metrics = dict(zip(metrics, sums.tolist(), strict=True))
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


def policy_loss(
    agent: Agent, hidden: Tensor, tokens: Tensor, t: Trajectories, targets: Targets, config: Config, denominator: int
) -> tuple[Tensor, dict[str, float]]:
    """One microbatch's share of the policy loss: of response tokens `tokens`, predicted by hidden states [n, h]."""
    c = config.train
    ids, old, advantages, ref = (
        None if x is None else x[tokens].to(agent.device)
        for x in (t.response_ids, t.old_logprobs, targets.advantages, targets.ref_logprobs)
    )
    loss, metrics = agent.ppo_loss(
        hidden, ids, old, advantages, ref_logprobs=ref, temperature=config.agent.temperature, clip_low=c.clip_low,
        clip_high=c.clip_high, dual_clip=c.dual_clip, kl_coef=c.kl_coef, entropy_coef=c.entropy_coef,
        denominator=denominator,
    )  # fmt: skip
    parts = {name: metrics[name].item() for name in ("kl", "entropy", "clip_fraction") if name in metrics}
    return loss, {"policy": loss.item()} | parts
