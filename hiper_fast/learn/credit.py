"""From trajectories to what an update learns from: the estimator's credit, spread over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Estimator, Turns, Values
from hiper_fast.learn.score import Scores
from hiper_fast.ops import HAE, reference
from hiper_fast.packing import spread
from hiper_fast.rollout.trajectory import Trajectories

SINGLE_ROLES = [reference.ACTION, reference.SUBGOAL, reference.SWITCH]  # what the fused op scatters


@dataclass(slots=True)
class Targets:
    """What an update learns from; fixed while it runs."""

    advantages: Tensor  # float32 [tokens]
    loss_mask: Tensor  # bool [tokens]
    ref_logprobs: Tensor | None  # float32 [tokens], where loss_mask; None without a KL term
    old_values: Tensor | None  # float32 [turns, 3]; None without a critic
    returns: Tensor | None  # float32 [turns, 3]
    value_mask: Tensor | None  # bool [turns, 3]: which turns train which head
    credit: Credit  # per turn, for the report


def give_credit(
    trajectories: Trajectories, scores: Scores, estimate: Estimator, config: AdvantageConfig
) -> Targets:
    """Values -> the estimator's advantages -> token advantages, each level normalised if asked for."""
    roles, cu_tokens = trajectories.roles, trajectories.cu_tokens
    credit = estimate(view_turns(trajectories), scores.values, config)
    advantages, loss_mask, credit = scatter(credit, roles, cu_tokens, config.normalize)
    if scores.values is None:
        return Targets(advantages, loss_mask, scores.ref_logprobs, None, None, None, credit)
    returns, value_mask = collect_returns(credit, scores.values)
    values = scores.values.turns
    return Targets(advantages, loss_mask, scores.ref_logprobs, values, returns, value_mask, credit)


def view_turns(trajectories: Trajectories) -> Turns:
    """What an estimator may see of them."""
    turn = spread(torch.arange(trajectories.turns), trajectories.cu_tokens)  # [tokens]
    roles = torch.zeros(trajectories.turns, dtype=torch.uint8)
    for role in SINGLE_ROLES:
        carried = turn[(trajectories.roles & role) > 0]
        roles |= torch.zeros_like(roles).index_fill(0, carried, role)
    return Turns(
        trajectories.rewards, trajectories.switch, trajectories.valid, roles, trajectories.state,
        trajectories.cu_turns, trajectories.terminated, trajectories.group,
    )  # fmt: skip


def collect_returns(credit: Credit, values: Values) -> tuple[Tensor, Tensor]:
    """The critic's targets, float32 [turns, 3], and which turns train which head, bool [turns, 3]."""
    returns = torch.zeros_like(values.turns)
    learned = torch.zeros_like(values.turns, dtype=torch.bool)
    for level in credit.levels:
        if level.returns is not None:
            returns[:, level.head], learned[:, level.head] = level.returns, level.learned
    return returns, learned


def scatter(
    credit: Credit, roles: Tensor, cu_tokens: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Credit]:
    """Token advantages [tokens], the loss mask [tokens], and the credit as it was scattered."""
    if is_fused(credit, normalize):
        return scatter_fused(credit, roles, cu_tokens, normalize)
    advantages = torch.zeros(roles.shape)  # [tokens]
    loss_mask = torch.zeros(roles.shape, dtype=torch.bool)  # [tokens]
    turn = spread(torch.arange(cu_tokens.numel() - 1), cu_tokens)  # [tokens]
    levels = []
    for level in credit.levels:
        trained = ((roles & level.roles) > 0) & level.carried[turn]  # [tokens]
        if normalize and level.raw:
            carried = torch.zeros_like(level.carried).index_fill(0, turn[trained], True)
            level = replace(level, advantages=ops.normalize(level.advantages, carried))
        advantages += torch.where(trained, level.advantages[turn], 0.0)
        loss_mask |= trained
        levels.append(level)
    return advantages, loss_mask, Credit(tuple(levels))


def is_fused(credit: Credit, normalize: bool) -> bool:
    """Whether one op scatters it: a level a role, low and switch on every turn."""
    if [level.roles for level in credit.levels] != SINGLE_ROLES:
        return False
    low, _, switch = credit.levels
    raw = all(level.raw for level in credit.levels) or not normalize
    return raw and bool(low.carried.all() and switch.carried.all())


def scatter_fused(
    credit: Credit, roles: Tensor, cu_tokens: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Credit]:
    low, high, switch = credit.levels
    given = HAE(low.advantages, None, high.advantages, None, switch.advantages, None, high.carried)
    if not normalize:
        return *ops.scatter_advantages(given, roles, cu_tokens), credit
    advantages, loss_mask, given = ops.normalize_and_scatter(given, roles, cu_tokens)
    levels = (
        replace(low, advantages=given.advantages_low),
        replace(high, advantages=given.advantages_high),
        replace(switch, advantages=given.advantages_switch),
    )
    return advantages, loss_mask, Credit(levels)
