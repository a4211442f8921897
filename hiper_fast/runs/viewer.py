"""Episodes as the report's viewer reads them: what was seen, said, earned and credited."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from itertools import groupby
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
BLOCKS = {"switch": "switch", "high": "subgoal", "low": "action"}  # level -> what its tokens say

Decode = Callable[[list[int]], bytes]


def write_episodes(
    folder: Path,
    step: int,
    stage: str,
    trajectories: Trajectories,
    credit: Credit | None = None,
    values: Tensor | None = None,
    *,
    decode: Decode | None = None,
    count: int = 8,
) -> None:
    """Writes the first `count` episodes to `folder/step-XXXXXX.jsonl`, one a line.

    `values` is float32 [turns, 3]: low, high, switch. With `decode`, token ids -> bytes, responses are also
    kept in pieces, each with the block as which its tokens trained.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}.jsonl"
    former = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in former if json.loads(line)["stage"] != stage]
    for index in range(min(count, len(trajectories.episodes))):
        record = build_record(trajectories, index, credit, values, decode)
        lines.append(json.dumps(record | {"step": step, "stage": stage}))
    replace_text(path, "".join(line + "\n" for line in lines))


def build_record(
    trajectories: Trajectories,
    index: int,
    credit: Credit | None,
    values: Tensor | None,
    decode: Decode | None = None,
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
        advantages = _read_advantages(credit, i)
        if decode:
            said["pieces"] = _cut_pieces(trajectories, i, advantages, decode)
        turns.append(said | advantages | _read_values(values, i))
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


def _cut_pieces(
    trajectories: Trajectories, turn: int, advantages: dict[str, float | None], decode: Decode
) -> list[tuple[str, str]]:
    """The response as (text, block): runs of tokens that trained as one block, "" as none."""
    begin, end = trajectories.cu_tokens[turn : turn + 2].tolist()
    ids = trajectories.response_ids[begin:end].tolist()
    blocks = [_name_block(role, advantages) for role in trajectories.roles[begin:end].tolist()]
    decoder, pieces = codecs.getincrementaldecoder("utf-8")("replace"), []
    for block, run in groupby(zip(blocks, ids, strict=True), key=lambda pair: pair[0]):
        text = decoder.decode(decode([token for _, token in run]))
        if text:
            pieces.append((text, block))
    if rest := decoder.decode(b"", final=True):
        pieces.append((rest, blocks[-1]))
    return pieces


def _name_block(role: int, advantages: dict[str, float | None]) -> str:
    """That of a token's roles whose level it trained; where none did, that of any."""
    own = [name for name, (bit, _) in LEVELS.items() if role & bit]
    trained = [name for name in own if advantages[f"advantage_{name}"] is not None]
    return BLOCKS[(trained or own)[0]] if own else ""
