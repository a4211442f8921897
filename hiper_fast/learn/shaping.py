"""What is changed in episodes before they are learned from: penalties, and the roles of malformed turns."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.config import Config, RewardConfig
from hiper_fast.ops import reference
from hiper_fast.rollout.trajectory import Trajectories


def shape(trajectories: Trajectories, config: Config) -> None:
    """Writes rewards, and with `advantage.malformed` roles, anew."""
    if config.advantage.malformed:
        train_malformed(trajectories)
    trajectories.rewards = shape_rewards(trajectories, config.reward)


def shape_rewards(trajectories: Trajectories, config: RewardConfig) -> Tensor:
    """Environment rewards plus penalties for invalid, KEEP and inconsistent KEEP turns; float32 [turns].

    A KEEP turn is one whose response did not switch. `normalized` puts keep * (KEEP turns / T) / (KEEP
    turns) on each and skips episodes of one turn; `fixed` puts keep. Consistency compares the subgoal's
    token ids, tags included, with those of the turn before.
    """
    keeps = ~trajectories.switch
    rewards = trajectories.rewards + config.invalid * ~trajectories.valid
    if config.keep:
        lengths = trajectories.cu_turns.diff().long()
        lengths = lengths.repeat_interleave(lengths)  # [turns], of each turn's episode
        normalized = torch.where(lengths > 1, config.keep / lengths, 0.0)
        rewards = (
            rewards + (normalized if config.keep_mode == "normalized" else config.keep) * keeps
        )
    if config.consistency:
        rewards = rewards + config.consistency * (keeps & find_new_subgoals(trajectories))
    return rewards


def find_new_subgoals(trajectories: Trajectories) -> Tensor:
    """bool [turns]: whose subgoal differs from the one of the turn before, where both have one."""
    bounds = trajectories.cu_tokens.tolist()
    is_subgoal = (trajectories.roles & reference.SUBGOAL) > 0
    ids = [
        trajectories.response_ids[begin:end][is_subgoal[begin:end]].tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False)
    ]
    differs = [
        bool(now and before) and now != before for before, now in zip(ids, ids[1:], strict=False)
    ]
    found = torch.tensor([False, *differs][: len(ids)], dtype=torch.bool)
    first = trajectories.cu_turns[:-1][trajectories.cu_turns.diff() > 0]
    return found.index_fill(0, first.long(), False)


def train_malformed(trajectories: Trajectories) -> None:
    """Gives the tokens outside every block of an invalid turn the action's role.

    Else nothing teaches a policy not to sample them again: a block counts only with both its tags. What
    they are measured against is the estimator's concern.
    """
    invalid = ~trajectories.valid.repeat_interleave(trajectories.cu_tokens.diff())
    stray = (trajectories.roles == 0) & invalid
    trajectories.roles = trajectories.roles.masked_fill(stray, reference.ACTION)
