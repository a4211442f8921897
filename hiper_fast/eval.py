"""Success on a fixed panel of unseen games, a row per task type.

python -m hiper_fast.eval --checkpoint runs/household-seed0                              # its best checkpoint
python -m hiper_fast.eval --checkpoint runs/household-seed0/checkpoints/step-000028
python -m hiper_fast.eval --checkpoint runs/a runs/b --sampling-seed 0,1,2 --json all.json   # each episode in a file
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiper_fast import configure
from hiper_fast.agent.runtime import configure_torch
from hiper_fast.config import Config
from hiper_fast.envs.base import GameError
from hiper_fast.envs.family import Task
from hiper_fast.options import ConfigError
from hiper_fast.rollout.ahead import Ahead
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Draw, Rollouts, describe_lost, open_rollouts
from hiper_fast.rollout.policy import load_policy
from hiper_fast.rollout.prompter import make_prompter
from hiper_fast.rollout.summary import summarise_limits, summarise_scores
from hiper_fast.rollout.trajectory import Episode, Trajectories
from hiper_fast.runs import checkpoint
from hiper_fast.runs.folder import find_config, replace_text
from hiper_fast.runs.health import Health
from hiper_fast.runs.metrics import list_success, wilson
from hiper_fast.runs.statistics import pool
from hiper_fast.text import clean

Row = tuple[str, float, int, float, float]  # name, success, games, and the interval of the success


def evaluate(
    rollouts: Rollouts | Ahead, games: Games, config: Config, *, seed: int = 0
) -> tuple[dict, Trajectories]:
    """Plays the panel once: the metrics under `eval/` and the episodes. `seed` is the sampling's."""
    started = time.perf_counter()
    tasks = games.list_panel()
    trajectories = rollouts.play(Draw(tasks, config.eval.temperature, seed))
    episodes = len(trajectories.episodes)
    by_type = defaultdict(list)
    for episode in trajectories.episodes:
        by_type[episode.task_type].append(episode.won)
    low, high = wilson(int(trajectories.won.sum()), episodes)
    metrics = {
        "eval/success": float(trajectories.won.float().mean()),
        "eval/low": low,
        "eval/high": high,
        "eval/episodes": episodes,
        "eval/lost": len(trajectories.lost),
        **summarise_scores("eval", trajectories.episodes),
        **summarise_limits("eval", trajectories.episodes),
        "eval/turns": trajectories.turns / episodes,
        "eval/valid_rate": float(trajectories.valid.float().mean()),
        "time/eval": time.perf_counter() - started,
    }
    for name, won in sorted(by_type.items()):
        metrics[f"eval/success/{name}"] = sum(won) / len(won)
        metrics[f"eval/episodes/{name}"] = len(won)
        metrics[f"eval/won/{name}"] = "".join("01"[w] for w in won)  # in the panel's order
    return metrics, trajectories


def format_table(metrics: dict) -> str:
    """The evaluation as text: a row per task type, then all, each with its Wilson 95 % interval."""
    return "\n".join([*format_rows("task type", list_success(metrics)), *format_scores(metrics)])


def format_rows(title: str, rows: Sequence[Row]) -> list[str]:
    width = max(32, *(len(name) + 1 for name, *_ in rows))
    lines = [f"{title:<{width}}{'games':>6}{'success':>9}   95 % interval"]
    for name, success, count, low, high in rows:
        lines.append(f"{name:<{width}}{count:>6}{success:>9.1%}   {low:.1%} to {high:.1%}")
    return lines


def format_scores(metrics: dict) -> list[str]:
    """A line, where the environment gives a score."""
    if "eval/score" not in metrics:
        return []
    score, reachable, success, reachable_score = (
        metrics[f"eval/{name}"]
        for name in ("score", "reachable", "success_reachable", "score_reachable")
    )
    return [f"score {score:.3f}; over the {reachable:.1%} of goals that can be met to the full: "
            f"success {success:.1%}, score {reachable_score:.3f}"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Played:
    """The panel, played once."""

    checkpoint: str
    sampling_seed: int
    tasks: list[Task]
    episodes: list[Episode]
    metrics: dict[str, Any]

    @property
    def row(self) -> Row:
        name = f"{self.checkpoint}, sampling seed {self.sampling_seed}"
        return name, *list_success(self.metrics)[-1][1:]


def play_panel(path: Path, config: Config, seeds: Sequence[int]) -> tuple[list[Played], dict]:
    """The panel of one checkpoint's configuration, once a seed; and what the environment says of its data."""
    games = Games(config)
    agent = load_policy(config, config.run.seed)
    prompter = make_prompter(agent.tokenizer, config.agent, games.family)
    played, health = [], Health()
    with open_rollouts(agent, games.family, prompter, config) as rollouts:
        for number, seed in enumerate(seeds):
            metrics, trajectories = evaluate(rollouts, games, config, seed=seed)
            if trajectories.lost:
                print(f"episodes lost: {describe_lost(trajectories.lost)}", file=sys.stderr)
            for text in health.read({"step": number, "stage": "eval", **metrics}):
                print(text, file=sys.stderr)
            gone = {one.number for one in trajectories.lost}
            tasks = [task for i, task in enumerate(games.list_panel()) if i not in gone]
            played.append(Played(str(path), seed, tasks, trajectories.episodes, metrics))
    return played, games.family.describe_data()


def pool_types(played: Sequence[Played]) -> list[Row]:
    """Success by task type, then of all games, over all the times that each was played."""
    types = np.array([episode.task_type for episode in played[0].episodes])  # [games]
    won = np.array([[e.won for e in one.episodes] for one in played], dtype=float)  # [plays, games]
    masks = {name: types == name for name in sorted(set(types.tolist()))}
    masks["all"] = np.ones_like(types, dtype=bool)
    return [
        (name, estimate.value, int(mask.sum()), estimate.low, estimate.high)
        for name, mask in masks.items()
        for estimate in (pool(won[:, mask]),)
    ]


def format_all(played: Sequence[Played]) -> str:
    """One evaluation as a table; several as a row each, then by task type over all of them, if their games agree."""
    if len(played) == 1:
        return format_table(played[0].metrics)
    lines = format_rows("checkpoint", [one.row for one in played])
    if not are_alike(played):
        return "\n".join([*lines, "", "Not pooled: they played different games."])
    scores = summarise_scores("eval", [e for one in played for e in one.episodes])
    title = f"task type, all {len(played)} pooled"
    return "\n".join([*lines, "", *format_rows(title, pool_types(played)), *format_scores(scores)])


def are_alike(played: Sequence[Played]) -> bool:
    """Whether all played the same games: seeds alone mean others where env has other options."""
    told = [(one.tasks, [episode.task for episode in one.episodes]) for one in played]
    return all(games == told[0] for games in told)


def describe_all(played: Sequence[Played], config: Config, data: dict) -> dict[str, Any]:
    """What `--json` keeps: results, and a row an episode; `game` is what `reset` was given."""
    names = "name", "success", "games", "low", "high"
    return {
        "panel": asdict(config.eval) | {"environment": config.env.name},
        "data": data,
        "results": [
            {"checkpoint": one.checkpoint, "sampling_seed": one.sampling_seed}
            | dict(zip(names[1:], one.row[1:], strict=True))
            for one in played
        ],
        "pooled": [dict(zip(names, row, strict=True)) for row in pool_types(played)]
        if are_alike(played)
        else None,
        "episodes": [
            {
                "checkpoint": one.checkpoint,
                "sampling_seed": one.sampling_seed,
                "game": task,
                "type": episode.task_type,
                "won": episode.won,
                "turns": len(episode.responses),
                "score": episode.score,
            }
            for one in played
            for task, episode in zip(one.tasks, one.episodes, strict=True)
        ],
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    replace_text(file, json.dumps(content, indent=1, default=str) + "\n")
    print(f"written: {file}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.eval",
        description=__doc__.splitlines()[0],
        epilog="The dotted options of hiper_fast.train say what is played: --env.size medium, --eval.episodes 1000, …",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="extend",
        nargs="+",
        type=Path,
        help="a run's folder, for its best checkpoint; a folder under runs/<name>/checkpoints; or any causal LM "
        "folder (its tokenizer is enough where another serves it: --rollout.engine openai). Of several each gets a "
        "row, and all are pooled over games",
    )
    parser.add_argument(
        "--config", action="append", help="the run's config.yaml [found beside the checkpoint]"
    )
    parser.add_argument(
        "--sampling-seed",
        default="0",
        metavar="SEEDS",
        help="seed of the sampling, or several (0,1,2), each of which plays the panel once [0]",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write results and a row for every episode to it"
    )
    return parser


def read_seeds(text: str) -> list[int]:
    """`--sampling-seed`; ConfigError for what is none."""
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise ConfigError(
            f"--sampling-seed: expected whole numbers from 0 on (0,1,2), got {text!r}"
        )
    if len({int(word) for word in words}) < len(words):
        raise ConfigError(f"--sampling-seed: each of them once, got {text!r}")
    return [int(word) for word in words]


def read_config(path: Path, files: Sequence[str], overrides: Sequence[str]) -> Config:
    """What the command line says, over the configuration found beside the checkpoint if no file is given."""
    argv = [f"--config={file}" for file in files]
    # A folder, also if its name is "tiny".
    argv += [*overrides, f"--model={path.absolute()}"]
    own = None if files else find_config(path)
    return configure.parse(argv, program="eval", description=__doc__, run=own)


def check_arguments(arguments: argparse.Namespace) -> None:
    for path in arguments.checkpoint:
        if not path.is_dir():
            raise ConfigError(f"--checkpoint: there is no folder {path}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {arguments.json.absolute().parent}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    played, data = [], {}
    try:
        seeds = read_seeds(arguments.sampling_seed)
        paths = [checkpoint.find(path) for path in arguments.checkpoint]
        configs = [read_config(path, arguments.config or [], overrides) for path in paths]
        check_arguments(arguments)
        for given, path, config in zip(arguments.checkpoint, paths, configs, strict=True):
            if path != given:
                print(checkpoint.describe_choice(given, path), flush=True)
            configure_torch(config.run)
            some, data = play_panel(path, config, seeds)
            played += some
        print(format_all(played))
        if data:
            print(clean(", ".join(f"{key}: {value}" for key, value in data.items())))
        if arguments.json:
            write_json(arguments.json, describe_all(played, configs[0], data))
    except (ConfigError, GameError, checkpoint.CheckpointError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
