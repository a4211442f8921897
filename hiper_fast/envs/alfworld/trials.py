"""Which trials are played, and whether their files can be: a few thousand in a second or two, on all cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ..base import GameError
from .game import GAME_FILE, Game, read_game

SHARE = 100  # trials that are worth another process
_WORKER = "from hiper_fast.envs.alfworld.trials import serve; serve()"


class Verdict(NamedTuple):
    """On a trial: it is played if both are empty."""

    reason: str = ""  # against playing it, in the order of ALFWorld's loader
    fault: str = ""  # of its file


def judge(trial: Path, task_types: Collection[str] | None, *, whole: bool) -> Verdict:
    """On one trial; `whole` parses all that is to be played, else its file is only read."""
    task = trial.parent.name
    kind = f"{task}/{trial.name}"
    if "movable" in kind:
        return Verdict("with a movable receptacle")
    if "Sliced" in kind:
        return Verdict("with a sliced object")
    if task_types is not None and task.split("-", 1)[0] not in task_types:
        return Verdict("of other task types")
    file = trial / GAME_FILE
    if not file.exists():
        return Verdict("without a game file")
    try:
        content = read_game(file)
        if whole and content.get("solvable"):
            Game.from_dict(content, str(file))
    except GameError as error:
        return Verdict(fault=str(error))
    if "solvable" not in content:
        return Verdict("not known to be solvable")
    return Verdict("" if content["solvable"] else "not solvable")


def judge_all(
    trials: list[Path], task_types: Collection[str] | None, *, whole: bool
) -> list[Verdict]:
    """On every trial, in order; where they are parsed and many, by several processes."""
    count = min(len(trials) // SHARE, count_cores()) if whole and sys.executable else 0
    if count < 2:
        return [judge(trial, task_types, whole=whole) for trial in trials]
    shares = [trials[i::count] for i in range(count)]
    verdicts: list[Verdict] = [Verdict()] * len(trials)
    for i, judged in enumerate(judge_shares(shares, task_types)):
        verdicts[i::count] = judged
    return verdicts


def judge_shares(
    shares: list[list[Path]], task_types: Collection[str] | None
) -> Iterator[list[Verdict]]:
    """Each share by a process of its own, which this one's imports, threads and signals do not reach."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        for _ in shares
    ]
    try:
        for worker, share in zip(workers, shares, strict=True):
            asked = {"trials": [str(trial) for trial in share], "task_types": task_types}
            with worker.stdin as pipe:
                pipe.write(json.dumps(asked, default=list).encode())
        for worker, share in zip(workers, shares, strict=True):
            answer = worker.stdout.read()
            if worker.wait() == 0:
                yield [Verdict(*verdict) for verdict in json.loads(answer)]
            else:
                yield [judge(trial, task_types, whole=True) for trial in share]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()


def serve() -> None:
    """What a worker does: a share from stdin, its verdicts to stdout."""
    asked = json.load(sys.stdin)
    trials, task_types = map(Path, asked["trials"]), asked["task_types"]
    json.dump([judge(trial, task_types, whole=True) for trial in trials], sys.stdout)


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
