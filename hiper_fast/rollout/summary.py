"""What a person wants to know of a batch of episodes."""

from __future__ import annotations

import torch

from hiper_fast.packing import spread
from hiper_fast.rollout.trajectory import Episode, Trajectories

ALIKE = 1e-6  # a spread of returns below it is rounding


def summarise(trajectories: Trajectories) -> dict[str, float]:
    """Metrics under `rollout/`; rates are per turn, success per episode."""
    episodes, turns = len(trajectories.episodes), trajectories.turns
    first_turns = trajectories.cu_turns[:-1].long()
    segments = trajectories.switch.index_fill(0, first_turns, True).sum().item()
    near_misses = (episode.near_misses for episode in trajectories.episodes)
    return {
        "rollout/success": trajectories.won.float().mean().item(),
        **summarise_scores("rollout", trajectories.episodes),
        "rollout/reward": trajectories.rewards.sum().item() / episodes,
        "rollout/turns": turns / episodes,
        "rollout/segment_length": turns / segments,
        "rollout/switch_rate": trajectories.switch.float().mean().item(),
        "rollout/valid_rate": trajectories.valid.float().mean().item(),
        "rollout/near_miss_rate": sum(near_misses) / turns,
        "rollout/prompt_tokens": trajectories.prompt_ids.numel() / turns,
        "rollout/response_tokens": trajectories.response_ids.numel() / turns,
        **summarise_limits("rollout", trajectories.episodes),
        "rollout/lost": len(trajectories.lost),
        "rollout/updates_behind": trajectories.updates_behind,
        **summarise_groups(trajectories),
    }


def summarise_groups(trajectories: Trajectories) -> dict[str, float]:
    """Of games that are played more than once: the share all of whose episodes have the same return.

    Estimators that compare a game's episodes learn nothing from those.
    """
    _, place, count = trajectories.group.unique(return_inverse=True, return_counts=True)
    shared = count > 1  # [groups]
    if not shared.any():
        return {}
    episode = spread(torch.arange(len(place)), trajectories.cu_turns)  # [turns]
    returns = torch.zeros(len(place), dtype=torch.float64)  # [trajectories]
    returns = returns.index_add(0, episode, trajectories.rewards.double())
    highest, lowest = (
        returns.new_zeros(len(count)).scatter_reduce(0, place, returns, end, include_self=False)
        for end in ("amax", "amin")
    )  # [groups]
    alike = (highest - lowest <= ALIKE)[shared]
    return {"rollout/groups_alike": alike.float().mean().item()}


def summarise_limits(stage: str, episodes: list[Episode]) -> dict[str, float]:
    """How many prompts were cut, and how many responses were as long as they may be."""
    return {
        f"{stage}/truncated_prompts": sum(episode.truncated_prompts for episode in episodes),
        f"{stage}/responses_at_limit": sum(episode.responses_at_limit for episode in episodes),
    }


def summarise_scores(stage: str, episodes: list[Episode]) -> dict[str, float]:
    """Of environments that give a score in [0, 1]: its mean, and both over goals that can be met."""
    if any(episode.score is None for episode in episodes):
        return {}
    reachable = [episode for episode in episodes if episode.reachable]
    won, score = (sum(getattr(e, name) for e in reachable) for name in ("won", "score"))
    return {
        f"{stage}/score": sum(episode.score for episode in episodes) / len(episodes),
        f"{stage}/reachable": len(reachable) / len(episodes),
        f"{stage}/success_reachable": won / max(1, len(reachable)),
        f"{stage}/score_reachable": score / max(1, len(reachable)),
    }
