"""Episodes as the report's viewer reads them: what was seen, said and earned, with each level's advantage."""

from __future__ import annotations

import json
from pathlib import Path

from hiper_fast.hiper import HIGH, LOW, SWITCH, Targets
from hiper_fast.trajectory import Trajectories


def write_episodes(
    folder: Path, step: int, stage: str, t: Trajectories, targets: Targets | None = None, *, count: int = 8
) -> None:
    """Writes the first `count` episodes to `folder/step-XXXXXX.jsonl`, one a line; no `targets`, no advantages."""
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps(episode_record(t, i, targets) | {"step": step, "stage": stage})
        for i in range(min(count, len(t.episodes)))
    ]
    path = folder / f"step-{step:06d}.jsonl"
    others = (
        [line for line in path.read_text().splitlines() if json.loads(line)["stage"] != stage] if path.exists() else []
    )
    temporary = path.with_name(f".{path.name}.tmp")  # a kill or a full disk never leaves half a line
    temporary.write_text("".join(line + "\n" for line in others + lines))
    temporary.replace(path)


def episode_record(t: Trajectories, index: int, targets: Targets | None) -> dict:
    episode, first = t.episodes[index], int(t.cu_turns[index])
    turns = []
    for offset, turn in enumerate(episode.turns):
        i = first + offset
        levels = targets.levels if targets else None
        boundary = levels is not None and bool(levels.boundary[i])
        turns.append(
            {
                "observation": turn.observation,
                "response": turn.response,
                "switch": bool(t.switch[i]),
                "valid": bool(t.valid[i]),
                "subgoal": turn.subgoal,
                "action": turn.action,
                "reward": float(t.rewards[i]),
                "advantage_switch": float(levels.advantages_switch[i]) if levels else None,
                "advantage_high": float(levels.advantages_high[i]) if boundary else None,
                "advantage_low": float(levels.advantages_low[i]) if levels else None,
                "value_switch": float(targets.old_values[i, SWITCH]) if targets else None,
                "value_high": float(targets.old_values[i, HIGH]) if targets else None,
                "value_low": float(targets.old_values[i, LOW]) if targets else None,
            }
        )
    return {
        "task": episode.task,
        "task_type": episode.task_type,
        "won": episode.won,
        "truncated": not episode.terminated,
        "turns": turns,
    }
