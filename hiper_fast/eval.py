"""Success on a fixed panel of unseen games, a row per task type.

python -m hiper_fast.eval --checkpoint runs/household-seed0/checkpoints/step-000028
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

from hiper_fast import configure
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.loading import load_agent
from hiper_fast.agent.runtime import configure_torch
from hiper_fast.config import Config
from hiper_fast.envs.base import GameError
from hiper_fast.options import ConfigError
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import play_tasks
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.summary import summarise_limits, summarise_scores
from hiper_fast.rollout.trajectory import Trajectories
from hiper_fast.runs.folder import find_config
from hiper_fast.runs.metrics import list_success, wilson


def evaluate(
    agent: Agent, games: Games, prompter: Prompter, config: Config, *, seed: int = 0
) -> tuple[dict, Trajectories]:
    """Plays the panel once: the metrics under `eval/` and the episodes. `seed` is the sampling's."""
    started = time.perf_counter()
    tasks = games.list_panel()
    envs = games.make(len(agent.world.share(tasks)))
    trajectories = play_tasks(
        agent, envs, tasks, games.family, prompter, config,
        temperature=config.eval.temperature, seed=seed,
    )  # fmt: skip
    by_type = defaultdict(list)
    for episode in trajectories.episodes:
        by_type[episode.task_type].append(episode.won)
    low, high = wilson(int(trajectories.won.sum()), len(tasks))
    metrics = {
        "eval/success": float(trajectories.won.float().mean()),
        "eval/low": low,
        "eval/high": high,
        "eval/episodes": len(tasks),
        **summarise_scores("eval", trajectories.episodes),
        **summarise_limits("eval", trajectories.episodes),
        "eval/turns": trajectories.turns / len(tasks),
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
    lines = [f"{'task type':<32}{'games':>6}{'success':>9}   95 % interval"]
    for name, success, count, low, high in list_success(metrics):
        lines.append(f"{name:<32}{count:>6}{success:>9.1%}   {low:.1%} to {high:.1%}")
    if "eval/score" in metrics:
        score, reachable, success, reachable_score = (
            metrics[f"eval/{name}"]
            for name in ("score", "reachable", "success_reachable", "score_reachable")
        )
        lines.append(f"score {score:.3f}; over the {reachable:.1%} of goals that can be met to the full: "
                     f"success {success:.1%}, score {reachable_score:.3f}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.eval",
        description=__doc__.splitlines()[0],
        epilog="The dotted options of hiper_fast.train say what is played: --env.size medium, --eval.episodes 1000, …",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a folder under runs/<name>/checkpoints, or any causal LM folder",
    )
    parser.add_argument(
        "--config", action="append", help="the run's config.yaml [found beside the checkpoint]"
    )
    parser.add_argument("--sampling-seed", type=int, default=0, help="seed of the sampling [0]")
    arguments, overrides = parser.parse_known_args(argv)
    own = None if arguments.config else find_config(arguments.checkpoint)
    files = [f"--config={file}" for file in arguments.config or ()]
    # A folder, also if its name is "tiny".
    model = f"--model={arguments.checkpoint.absolute()}"
    config = configure.parse(
        [*files, *overrides, model], program="eval", description=__doc__, run=own
    )
    if not arguments.checkpoint.is_dir():
        print(
            f"{parser.prog}: --checkpoint: there is no folder {arguments.checkpoint}",
            file=sys.stderr,
        )
        return 2
    configure_torch(config.run)
    try:
        games = Games(config)
        agent = load_agent(config.model, config.run.seed)
        prompter = Prompter(agent.tokenizer, config.agent, games.family.styles[config.agent.style])
        prompter.check_room()
        metrics, _ = evaluate(agent, games, prompter, config, seed=arguments.sampling_seed)
    except (ConfigError, GameError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(format_table(metrics))
    if provenance := games.family.describe_data():
        print(", ".join(f"{key}: {value}" for key, value in provenance.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
