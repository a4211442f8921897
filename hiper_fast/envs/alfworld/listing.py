"""Which games of a split are played: those that ALFWorld's own loader plays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .game import GAME_FILE, TASK_TYPES, read_game

TRIAL_FILES = (GAME_FILE, "traj_data.json")  # either makes a folder a trial


@dataclass(frozen=True, slots=True)
class Listing:
    """The game files of a split, sorted, and how many trials are left out, by reason."""

    games: list[Path]
    left_out: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        count = len(self.games)
        told = "1 game" if count == 1 else f"{count:,} games"
        return f"{told} (left out: {reasons})" if reasons else told


def games(split: str, task_types: Collection[str] | None = None) -> list[Path]:
    """The sorted game files of a split ("train", "valid_seen", …) under $ALFWORLD_DATA.

    As of `list_games`, which counts what is left out too.
    """
    return list_games(split, task_types).games


def list_games(split: str, task_types: Collection[str] | None = None) -> Listing:
    """The games of a split, of these task types (None: all).

    Raises ValueError where there are none, GameError for a file that cannot be read.
    """
    if task_types is not None and not set(task_types) <= set(TASK_TYPES):
        raise ValueError(f"task_types is {task_types!r}; choose from {', '.join(TASK_TYPES)}")
    folder = find_split(split)
    trials = {path.parent for name in TRIAL_FILES for path in folder.glob(f"*/*/{name}")}
    if not trials:
        raise ValueError(f"split {split!r} is empty: no */*/{GAME_FILE} under {folder}")
    found, left_out = [], Counter()
    for trial in sorted(trials):
        if reason := find_reason_against(trial, task_types):
            left_out[reason] += 1
        else:
            found.append(trial / GAME_FILE)
    listing = Listing(found, dict(left_out))
    if not found:
        raise ValueError(f"split {split!r} has nothing to play under {folder}: {listing}")
    return listing


def find_split(split: str) -> Path:
    """The folder of a split."""
    root = os.environ.get("ALFWORLD_DATA")
    if not root:
        raise ValueError(
            "ALFWORLD_DATA is not set; point it at the folder that contains json_2.1.1"
        )
    folder = Path(root).expanduser()
    if (folder / "json_2.1.1").is_dir():
        folder = folder / "json_2.1.1"
    if not (folder / split).is_dir():
        raise ValueError(
            f"no split {split!r} under ALFWORLD_DATA: {folder / split} is not a folder"
        )
    return folder / split


def find_reason_against(trial: Path, task_types: Collection[str] | None) -> str:
    """Why a trial is not played, asked in the order of ALFWorld's loader; empty if it is."""
    task = trial.parent.name
    kind = f"{task}/{trial.name}"
    if "movable" in kind:
        return "with a movable receptacle"
    if "Sliced" in kind:
        return "with a sliced object"
    if task_types is not None and task.split("-", 1)[0] not in task_types:
        return "of other task types"
    if not (trial / GAME_FILE).exists():
        return "without a game file"
    content = read_game(trial / GAME_FILE)
    if "solvable" not in content:
        return "not known to be solvable"
    return "" if content["solvable"] else "not solvable"
