"""From trajectories to what an update learns from: the estimator's credit, spread over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import Credit, Estimator, Level, Turns, Values
from hiper_fast.learn.score import Scores
from hiper_fast.ops import HAE, reference
from hiper_fast.packing import find_ranges, spread
from hiper_fast.rollout.trajectory import Trajectories

SINGLE_ROLES = [reference.ACTION, reference.SUBGOAL, reference.SWITCH]  # what the fused op scatters


@dataclass(slots=True)
class Targets:
    """What an update learns from; fixed while it runs. Values have places: turns, or `per_token`."""

    advantages: Tensor  # float32 [tokens]
    loss_mask: Tensor  # bool [tokens]
    ref_logprobs: Tensor | None  # float32 [tokens], where loss_mask; None without a KL term
    old_values: Tensor | None  # float32 [places, 3]; None without a critic
    returns: Tensor | None  # float32 [places, 3]
    value_mask: Tensor | None  # bool [places, 3]: which places train which head
    credit: Credit  # per turn, for the report
    per_token: bool = False  # the places of values are tokens

    def turn_values(self, cu_tokens: Tensor) -> Tensor | None:
        """The old values where turns begin, float32 [turns, 3], for the report."""
        if not self.per_token:
            return self.old_values
        first = cu_tokens[:-1].long().clamp(max=len(self.old_values) - 1)  # [turns]
        return self.old_values[first]


def give_credit(
    trajectories: Trajectories, scores: Scores, estimate: Estimator, config: AdvantageConfig
) -> Targets:
    """Values -> the estimator's advantages -> token advantages, each level normalised if asked for.

    Weights of importance multiply the token advantages: every policy loss is homogeneous in them.
    """
    roles, cu_tokens, values = trajectories.roles, trajectories.cu_tokens, scores.values
    credit = estimate(view_turns(trajectories), values, config)
    advantages, loss_mask, told = scatter(credit, roles, cu_tokens, config.normalize)
    if scores.importance is not None:
        advantages = advantages * scores.importance
    if values is None:
        return Targets(advantages, loss_mask, scores.ref_logprobs, None, None, None, told)
    return Targets(
        advantages, loss_mask, scores.ref_logprobs, values.places, *collect_returns(credit, values),
        told, per_token=values.tokens is not None,
    )  # fmt: skip


def view_turns(trajectories: Trajectories) -> Turns:
    """What an estimator may see of them."""
    turn = spread(torch.arange(trajectories.turns), trajectories.cu_tokens)  # [tokens]
    roles = torch.zeros(trajectories.turns, dtype=torch.uint8)
    for role in SINGLE_ROLES:
        carried = turn[(trajectories.roles & role) > 0]
        roles |= torch.zeros_like(roles).index_fill(0, carried, role)
    return Turns(
        trajectories.rewards, trajectories.switch, trajectories.valid, roles, trajectories.state,
        trajectories.cu_turns, trajectories.cu_tokens, trajectories.terminated, trajectories.group,
    )  # fmt: skip


def collect_returns(credit: Credit, values: Values) -> tuple[Tensor, Tensor]:
    """The critic's targets, float32 [places, 3], and which places train which head, bool [places, 3]."""
    returns = torch.zeros_like(values.places)
    learned = torch.zeros_like(values.places, dtype=torch.bool)
    for level in credit.levels:
        if level.returns is not None:
            returns[:, level.head], learned[:, level.head] = level.returns, level.learned
    return returns, learned


def scatter(
    credit: Credit, roles: Tensor, cu_tokens: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Credit]:
    """Token advantages [tokens], the loss mask [tokens], and the credit as it was scattered, a number a turn."""
    if is_fused(credit, normalize):
        return scatter_fused(credit, roles, cu_tokens, normalize)
    advantages = torch.zeros(roles.shape)  # [tokens]
    loss_mask = torch.zeros(roles.shape, dtype=torch.bool)  # [tokens]
    turn = spread(torch.arange(cu_tokens.numel() - 1), cu_tokens)  # [tokens]
    levels = []
    for level in credit.levels:
        place = torch.arange(len(turn)) if level.per_token else turn  # [tokens]
        trained = ((roles & level.roles) > 0) & level.carried[place]  # [tokens]
        if normalize and level.raw:
            carried = torch.zeros_like(level.carried).index_fill(0, place[trained], True)
            level = replace(level, advantages=ops.normalize(level.advantages, carried))
        advantages += torch.where(trained, level.advantages[place], 0.0)
        loss_mask |= trained
        levels.append(average(level, trained, cu_tokens) if level.per_token else level)
    return advantages, loss_mask, Credit(tuple(levels))


def average(level: Level, trained: Tensor, cu_tokens: Tensor) -> Level:
    """A level of tokens as one of turns: the mean advantage of each one's `trained` [tokens] tokens."""
    turn = find_ranges(trained.nonzero()[:, 0], cu_tokens)  # [trained tokens]
    count = torch.zeros(len(cu_tokens) - 1).index_add(0, turn, torch.ones(len(turn)))
    total = torch.zeros_like(count).index_add(0, turn, level.advantages[trained])
    return Level(level.name, level.roles, total / count.clamp(min=1), count > 0, head=level.head)


def is_fused(credit: Credit, normalize: bool) -> bool:
    """Whether one op scatters it: a level a role, low and switch on every turn."""
    if [level.roles for level in credit.levels] != SINGLE_ROLES:
        return False
    if any(level.per_token for level in credit.levels):
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
