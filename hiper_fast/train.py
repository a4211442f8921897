"""Train an agent with HiPER, from the warm start to the report.

python -m hiper_fast.train                      # embedded default: household games, a tiny model, this machine
ALFWORLD_DATA=... python -m hiper_fast.train    # the official ALFWorld games
python -m hiper_fast.train --env webshop        # a generated shop; WEBSHOP_DATA=... the real one
python -m hiper_fast.train --model Qwen/Qwen2.5-1.5B-Instruct --config my.yaml --train.lr 1e-6
python -m hiper_fast.train --config alfworld --plan    # the memory and time that this would need, and no more
torchrun --nproc-per-node 8 -m hiper_fast.train …  # the same on 8 GPUs
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time

from hiper_fast import stopping

if __name__ == "__main__":
    stopping.catch_early()  # the imports below take seconds

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
from hiper_fast.resuming import tell_finished, tell_stop
from hiper_fast.rollout.play import Draw, TooManyLost
from hiper_fast.rollout.summary import summarise
from hiper_fast.runs.checkpoint import CheckpointError
from hiper_fast.session import Batch, Session, open_session
from hiper_fast.stopping import Stopping

ERRORS = (
    ConfigError, GameError, CheckpointError, TooManyLost, FloatingPointError, OSError, SafetensorError,
)  # fmt: skip


def train(config: Config, world: World) -> None:
    """One run: warm start, then updates of rollout -> values -> credit -> PPO; evaluations, checkpoints.

    A signal to stop ends it with `stopping.Stop`, saved.
    """
    if config.run.resume and (told := world.first(lambda: tell_finished(config))):
        if world.main:
            print(told)
        return
    with Stopping() as signals, open_session(config, world, signals) as session:
        for step in range(session.first_step, config.train.updates + 1):
            batch = learn(session, step) if step > 0 else None
            keep_and_tell(session, step, batch)
        session.report()


def learn(session: Session, step: int) -> Batch:
    """One update: play, give credit, learn from it."""
    config, agent = session.config, session.agent
    began = time.perf_counter()
    with session.logger.stage("rollout"), session.leaving_at_once():
        following = draw(session, step + 1) if step < config.train.updates else None
        trajectories = session.rollouts.play_on(draw(session, step), following)
    session.tell_lost(trajectories)
    with session.logger.stage("advantages"):
        shape(trajectories, config)
        scores = score(agent, trajectories, config)
        targets = give_credit(trajectories, scores, session.estimate, config.advantage)
    with session.logger.stage("update"):
        train_policy = schedule(session.optimizers, step, config.train)
        generator = torch.Generator().manual_seed(seed_step(config, step))
        losses = update(
            agent, session.optimizers, trajectories, targets, config, generator,
            train_policy=train_policy,
        )  # fmt: skip
    counts = {"episodes": step * config.train.episodes, "time/total": time.perf_counter() - began}
    session.logger.log(step, "train", summarise(trajectories) | scores.metrics | losses | counts)
    session.count_skipped(step, losses)
    return Batch(trajectories, targets)


def draw(session: Session, step: int) -> Draw:
    """The episodes of an update."""
    config = session.config
    tasks = session.games.draw(f"update {step}", config.train.episodes, config.train.group)
    return Draw(tasks, config.agent.temperature, seed_step(config, step), config.train.group)


def keep_and_tell(session: Session, step: int, batch: Batch | None) -> None:
    """Evaluates, records episodes and saves where it is time to; stops a run that cannot go on, or is to stop."""
    config, improved = session.config, False
    last = step == config.train.updates
    if session.is_stuck:
        session.report()
        raise FloatingPointError(session.tell_way_back())
    if step % config.eval.every == 0 or last:
        with session.leaving_at_once(step == 0 and config.warm_start.enabled == "no"):
            metrics, panel = evaluate(session.rollouts, session.games, config)
        session.tell_lost(panel)
        improved = session.note_success(metrics["eval/success"])
        session.logger.log(step, "eval", metrics)
        session.record(step, panel, batch)
    session.done = step
    to_stop, late = session.agree()
    due = (step % config.run.save_every == 0 or late) and not session.state["skipped"]
    if due or improved or last or to_stop:
        session.save(step, improved)
    if to_stop and not last:
        session.stop()


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
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal may be gone
            if stopping.speaks():
                print(f"{stopping.name(number)}: {tell_stop(config)}", file=sys.stderr)
        return stopping.STATUS + number
    return 0


if __name__ == "__main__":
    distributed.leave(main())
