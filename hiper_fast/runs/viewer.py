"""Episodes as the report's viewer reads them: what was seen, said, earned and credited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hiper_fast.estimators import HIGH, LOW, SWITCH, Credit
from hiper_fast.ops import reference
from hiper_fast.rollout.trajectory import Trajectories
from hiper_fast.runs.folder import replace_text

# As the file calls them: the block that a level trains, and the column of its value.
LEVELS = {
    "switch": (reference.SWITCH, SWITCH),
    "high": (reference.SUBGOAL, HIGH),
    "low": (reference.ACTION, LOW),
}


def write_episodes(
    folder: Path,
    step: int,
    stage: str,
    trajectories: Trajectories,
    credit: Credit | None = None,
    values: Tensor | None = None,
    *,
    count: int = 8,
) -> None:
    """Writes the first `count` episodes to `folder/step-XXXXXX.jsonl`, one a line.

    `values` is float32 [turns, 3]: low, high, switch.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}.jsonl"
    former = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in former if json.loads(line)["stage"] != stage]
    for index in range(min(count, len(trajectories.episodes))):
        record = build_record(trajectories, index, credit, values)
        lines.append(json.dumps(record | {"step": step, "stage": stage}))
    replace_text(path, "".join(line + "\n" for line in lines))


def build_record(
    trajectories: Trajectories, index: int, credit: Credit | None, values: Tensor | None
) -> dict[str, Any]:
    episode = trajectories.episodes[index]
    turns = []
    for i, turn in enumerate(episode.turns, int(trajectories.cu_turns[index])):
        said = {
            "observation": turn.observation,
            "response": turn.response,
            "switch": bool(trajectories.switch[i]),
            "valid": bool(trajectories.valid[i]),
            "subgoal": turn.subgoal,
            "action": turn.action,
            "reward": float(trajectories.rewards[i]),
        }
        turns.append(said | _read_advantages(credit, i) | _read_values(values, i))
    return {
        "task": episode.task,
        "task_type": episode.task_type,
        "won": episode.won,
        "truncated": not episode.terminated,
        "turns": turns,
    }


def _read_advantages(credit: Credit | None, turn: int) -> dict[str, float | None]:
    levels = [level for level in credit.levels if level.carried[turn]] if credit else []
    advantages = {}
    for name, (role, _) in LEVELS.items():
        trained = (float(level.advantages[turn]) for level in levels if level.roles & role)
        advantages[f"advantage_{name}"] = next(trained, None)
    return advantages


def _read_values(values: Tensor | None, turn: int) -> dict[str, float | None]:
    return {
        f"value_{name}": None if values is None else float(values[turn, column])
        for name, (_, column) in LEVELS.items()
    }
