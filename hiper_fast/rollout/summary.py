"""What a person wants to know of a batch of episodes."""

from __future__ import annotations

from hiper_fast.rollout.trajectory import Episode, Trajectories


def summarise(trajectories: Trajectories) -> dict[str, float]:
    """Metrics under `rollout/`; rates are per turn, success per episode."""
    episodes, turns = len(trajectories.episodes), trajectories.turns
    first_turns = trajectories.cu_turns[:-1].long()
    segments = trajectories.switch.index_fill(0, first_turns, True).sum().item()
    truncated = (episode.truncated_prompts for episode in trajectories.episodes)
    return {
        "rollout/success": trajectories.won.float().mean().item(),
        **summarise_scores("rollout", trajectories.episodes),
        "rollout/reward": trajectories.rewards.sum().item() / episodes,
        "rollout/turns": turns / episodes,
        "rollout/segment_length": turns / segments,
        "rollout/switch_rate": trajectories.switch.float().mean().item(),
        "rollout/valid_rate": trajectories.valid.float().mean().item(),
        "rollout/prompt_tokens": trajectories.prompt_ids.numel() / turns,
        "rollout/response_tokens": trajectories.response_ids.numel() / turns,
        "rollout/truncated_prompts": sum(truncated),
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
