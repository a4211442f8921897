"""Which games of a split are played: those that ALFWorld's own loader plays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..base import GameError
from .game import GAME_FILE, TASK_TYPES
from .trials import judge_all

TRIAL_FILES = (GAME_FILE, "traj_data.json")  # either makes a folder a trial
ARCHIVE = "json_2.1.1"  # what the official archive unpacks to
SPLITS = ("train", "valid_train", "valid_seen", "valid_unseen")
MEND = f"point it at the folder that contains {ARCHIVE}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The game files of a split, sorted, and how many trials are left out, by reason."""

    games: list[Path]
    left_out: dict[str, int]
    checked: bool = False  # every one of them was parsed

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        count = len(self.games)
        told = "1 game" if count == 1 else f"{count:,} games"
        told += ", checked" if self.checked and self.games else ""
        return f"{told} (left out: {reasons})" if reasons else told


def games(split: str, task_types: Collection[str] | None = None) -> list[Path]:
    """The sorted game files of a split ("train", "valid_seen", …) under $ALFWORLD_DATA.

    As of `list_games`, which counts what is left out too.
    """
    return list_games(split, task_types).games


def list_games(
    split: str, task_types: Collection[str] | None = None, *, check: bool = False
) -> Listing:
    """The games of a split, of these task types (None: all).

    `check` parses every game that is to be played, on all cores; else its file is only read. Raises
    ValueError where there are no games, and one GameError if files are damaged: it names the first
    and says how many.
    """
    if task_types is not None and not set(task_types) <= set(TASK_TYPES):
        raise ValueError(f"task_types is {task_types!r}; choose from {', '.join(TASK_TYPES)}")
    folder = find_split(split)
    trials = sorted({path.parent for name in TRIAL_FILES for path in folder.glob(f"*/*/{name}")})
    if not trials:
        raise ValueError(f"split {split!r} is empty: no */*/{GAME_FILE} under {folder}")
    verdicts = judge_all(trials, task_types, whole=check)
    if faults := [verdict.fault for verdict in verdicts if verdict.fault]:
        raise GameError(describe_faults(faults, len(trials), split))
    found = [
        trial / GAME_FILE
        for trial, verdict in zip(trials, verdicts, strict=True)
        if not verdict.reason
    ]
    left_out = Counter(verdict.reason for verdict in verdicts if verdict.reason)
    listing = Listing(found, dict(left_out), check)
    if not found:
        raise ValueError(f"split {split!r} has nothing to play under {folder}: {listing}")
    return listing


def describe_faults(faults: list[str], count: int, split: str) -> str:
    if len(faults) == 1:
        return f"{faults[0]} (unpack it again, or move its folder out of {split})"
    return (
        f"{faults[0]} (the first of {len(faults):,} damaged files among the {count:,} trials of {split}: "
        "unpack them again, or move their folders elsewhere)"
    )


def find_split(split: str) -> Path:
    """The folder of a split, also where $ALFWORLD_DATA is a level too deep or too high."""
    given = os.environ.get("ALFWORLD_DATA")
    if not given:
        raise ValueError(f"ALFWORLD_DATA is not set; {MEND}")
    root = Path(given).expanduser()
    if not root.is_dir():
        raise ValueError(f"ALFWORLD_DATA is {root}, which is no folder; {MEND}")
    for folders in ([root / ARCHIVE], [root], find_above(root), find_below(root, split)):
        found = [folder / split for folder in folders if (folder / split).is_dir()]
        if len(found) > 1:
            several = ", ".join(str(path.parent) for path in found)
            raise ValueError(f"ALFWORLD_DATA is {root}, which holds {several}; name one of them")
        if found:
            return found[0]
    wrong = root / ARCHIVE if (root / ARCHIVE).is_dir() else root
    raise ValueError(
        f"no split {split!r} under ALFWORLD_DATA: {wrong / split} is not a folder; {MEND}"
    )


def find_above(root: Path) -> list[Path]:
    """The data's folder, if `root` lies in it: a split, a task or a trial."""
    inside = [root.absolute(), *root.absolute().parents][:3]
    return [folder.parent for folder in inside if folder.name in SPLITS][:1]


def find_below(root: Path, split: str) -> list[Path]:
    """The data's folders that `root` holds a level further down."""
    archives = sorted(root.glob(f"*/{ARCHIVE}"))
    return archives or sorted(path.parent for path in root.glob(f"*/{split}"))
