"""Train an agent with HiPER, from the warm start to the report.

python -m hiper_fast.train                      # embedded default: household games, a tiny model, this machine
ALFWORLD_DATA=... python -m hiper_fast.train    # the official ALFWorld games
python -m hiper_fast.train --env webshop        # a generated shop; WEBSHOP_DATA=... the real one
python -m hiper_fast.train --model Qwen/Qwen2.5-1.5B-Instruct --config my.yaml --train.lr 1e-6
python -m hiper_fast.train --config alfworld --plan    # the memory and time that this would need, and no more
torchrun --nproc-per-node 8 -m hiper_fast.train …  # the same on 8 GPUs
"""

from __future__ import annotations

import sys
import time

import torch
from safetensors import SafetensorError

from hiper_fast import configure, distributed, plan
from hiper_fast.config import Config
from hiper_fast.distributed import World
from hiper_fast.envs.base import GameError
from hiper_fast.eval import evaluate
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.optim import schedule
from hiper_fast.learn.score import score
from hiper_fast.learn.shaping import shape
from hiper_fast.learn.update import update
from hiper_fast.options import ConfigError
from hiper_fast.rollout.play import play_tasks
from hiper_fast.rollout.summary import summarise
from hiper_fast.runs.checkpoint import CheckpointError
from hiper_fast.session import Batch, Session, open_session

ERRORS = ConfigError, GameError, CheckpointError, FloatingPointError, OSError, SafetensorError


def train(config: Config, world: World) -> None:
    """One run: warm start, then updates of rollout -> values -> credit -> PPO; evaluations, checkpoints."""
    with open_session(config, world) as session:
        for step in range(session.first_step, config.train.updates + 1):
            batch = learn(session, step) if step > 0 else None
            keep_and_tell(session, step, batch)
        session.report()


def learn(session: Session, step: int) -> Batch:
    """One update: play, give credit, learn from it."""
    config, agent, games = session.config, session.agent, session.games
    began = time.perf_counter()
    seed = seed_step(config, step)
    with session.logger.stage("rollout"):
        tasks = games.draw(f"update {step}", config.train.episodes, config.train.group)
        trajectories = play_tasks(
            agent, session.envs, tasks, games.family, session.prompter, config,
            temperature=config.agent.temperature, seed=seed, group=config.train.group,
        )  # fmt: skip
    with session.logger.stage("advantages"):
        shape(trajectories, config)
        scores = score(agent, trajectories, config)
        targets = give_credit(trajectories, scores, session.estimate, config.advantage)
    with session.logger.stage("update"):
        train_policy = schedule(session.optimizers, step, config.train)
        generator = torch.Generator().manual_seed(seed)
        losses = update(
            agent, session.optimizers, trajectories, targets, config, generator,
            train_policy=train_policy,
        )  # fmt: skip
    counts = {"episodes": step * config.train.episodes, "time/total": time.perf_counter() - began}
    session.logger.log(step, "train", summarise(trajectories) | losses | counts)
    session.count_skipped(losses)
    return Batch(trajectories, targets)


def keep_and_tell(session: Session, step: int, batch: Batch | None) -> None:
    """Evaluates, records episodes and saves where it is time to; stops a run that cannot go on."""
    config, improved = session.config, False
    last = step == config.train.updates or session.is_stuck
    if step % config.eval.every == 0 or last:
        metrics, panel = evaluate(session.agent, session.games, session.prompter, config)
        improved = session.note_success(metrics["eval/success"])
        session.logger.log(step, "eval", metrics)
        session.record(step, panel, batch)
    if step % config.run.save_every == 0 or improved or last:
        session.save(step, improved)
    if session.is_stuck:
        raise FloatingPointError(
            f"the loss was not finite in {session.state['skipped']} steps in a row, so the run saved its "
            f"state and stopped; lower train.lr (now {config.train.lr}) and continue with --resume "
            f"--name {session.folder.name}"
        )


def seed_step(config: Config, step: int) -> int:
    """The seed of an update's draws: a resumed run draws what the uninterrupted one would have drawn."""
    return (config.run.seed * 1_000_003 + step) % 2**63


def main(argv: list[str] | None = None) -> int:
    config = configure.parse(argv, program="train", description=__doc__)
    try:
        if config.plan.show:
            plan.show(config)
            return 0
        with distributed.start(config) as world:
            train(config, world)
    except ERRORS as error:
        print(f"python -m hiper_fast.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; continue from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    distributed.leave(main())
