"""What a run holds while it trains: games, networks, optimisers, and the folder where it keeps and tells."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch.optim import Optimizer

from hiper_fast import estimators, plan
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.loading import load_agent
from hiper_fast.agent.runtime import configure_torch, describe_computing
from hiper_fast.config import Config
from hiper_fast.distributed import World
from hiper_fast.estimators import Estimator
from hiper_fast.learn import demonstrations
from hiper_fast.learn.credit import Targets
from hiper_fast.learn.optim import build_optimizers
from hiper_fast.learn.warm_start import warm_start
from hiper_fast.options import flatten
from hiper_fast.resuming import (
    check_metrics,
    find_start,
    list_changes,
    load_reference,
    naming_others,
    save_reference,
    set_aside,
    spell_resume,
)
from hiper_fast.rollout.ahead import Ahead, check_ahead
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Rollouts, TooManyLost, describe_lost, open_rollouts
from hiper_fast.rollout.policy import refuse_own_weights
from hiper_fast.rollout.prompter import Prompter, make_prompter
from hiper_fast.rollout.trajectory import Trajectories
from hiper_fast.runs import checkpoint, model_card, report, trackers
from hiper_fast.runs.checkpoint import CheckpointError
from hiper_fast.runs.folder import (
    CHECKPOINT_CONFIG,
    find_run_folder,
    format_config,
    make_run_folder,
    write_config,
)
from hiper_fast.runs.lock import hold
from hiper_fast.runs.metrics import Logger, Muted, read_metrics
from hiper_fast.runs.rates import judge_rates
from hiper_fast.runs.viewer import write_episodes
from hiper_fast.stopping import Stop, Stopping

REFERENCE = "reference.safetensors"
MOST_SHARED = 0.1  # value coefficient above which the value loss rules a shared trunk


@dataclass(slots=True)
class Batch:
    """One update's episodes and what was learned from them."""

    trajectories: Trajectories
    targets: Targets


@dataclass(slots=True)
class Session:
    config: Config
    world: World
    games: Games
    agent: Agent
    prompter: Prompter
    rollouts: Rollouts | Ahead
    estimate: Estimator
    stopping: Stopping
    folder: Path = Path()
    logger: Logger | Muted = field(default_factory=Muted)
    saved: Path | None = None  # the checkpoint that the run goes on from
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    state: dict = field(default_factory=lambda: {"best": -1.0, "skipped": 0, "sound": 0})
    done: int | None = None  # the last whole step, 0 the policy before the first update
    kept: int | None = None  # that of the newest checkpoint
    kept_at: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def first_step(self) -> int:
        return 0 if self.done is None else self.done + 1

    @property
    def is_stuck(self) -> bool:
        return self.state["skipped"] >= self.config.train.max_skipped

    def count_skipped(self, step: int, losses: dict[str, float]) -> None:
        """Counts optimiser steps left out in a row, and notes the last update that had others."""
        if "loss/policy" in losses:
            self.state |= {"skipped": 0, "sound": step}
        else:
            self.state["skipped"] += losses["optim/skipped_steps"]

    def tell_way_back(self) -> str:
        """How a run that is stuck goes on.

        From before the last sound update: what it left behind may be what no loss is finite with, and played again
        from there, the same episodes would be.
        """
        config, steps = self.config, checkpoint.list_steps(self.checkpoints)
        before = [step for step in steps if step < self.state["sound"]] or steps[:1]
        start, lr = str(before[-1]), f"{config.train.lr / 2:g}"
        command = spell_resume(config, "--run.resume_from", start, "--train.lr", lr)
        return (
            f"the loss was not finite in {self.state['skipped']} steps in a row, so the run stopped; go back to "
            f"update {start} with a lower train.lr (now {config.train.lr}): {command}"
        )

    @contextlib.contextmanager
    def leaving_at_once(self, allowed: bool = True) -> Iterator[None]:
        """Within, if allowed, a signal ends the run there, as it was after its last whole step. Of many processes
        each would leave at a moment of its own; they go on."""
        rng = checkpoint.capture_rng()
        try:
            with self.stopping.at_once(allowed and self.world.size == 1):
                yield
        except (Stop, TooManyLost):
            checkpoint.restore_rng(rng)
            if self.done != self.kept:
                self.save(self.done, improved=False)
            raise

    def agree(self) -> tuple[bool, bool]:
        """Whether a process was asked to stop, and whether a checkpoint is due by the clock: the same in all."""
        minutes = self.config.run.save_minutes
        late = minutes and time.monotonic() - self.kept_at > 60 * minutes
        flags = torch.tensor([bool(self.stopping.asked), bool(late and self.world.main)])
        asked, due = self.world.sum(flags.int()).tolist()
        return bool(asked), bool(due)

    def stop(self) -> NoReturn:
        raise Stop(self.stopping.asked or signal.SIGTERM)

    def tell_lost(self, trajectories: Trajectories) -> None:
        """Of episodes that environments failed in: the others are whole, and are trained on."""
        if lost := trajectories.lost:
            self.logger.message(f"{len(lost)} episodes lost: {describe_lost(lost)}")

    def note_success(self, success: float) -> bool:
        """Whether it is the best so far."""
        improved = success > self.state["best"]
        self.state["best"] = max(self.state["best"], success)
        return improved

    def record(self, step: int, panel: Trajectories, batch: Batch | None) -> None:
        """Keeps some episodes for the report's viewer."""
        if not self.world.main:
            return
        episodes, decode = self.folder / "episodes", self.agent.decode
        write_episodes(episodes, step, "eval", panel, decode=decode)
        if batch:
            trajectories, targets = batch.trajectories, batch.targets
            values = targets.turn_values(trajectories.cu_tokens)
            credit = targets.credit
            write_episodes(episodes, step, "train", trajectories, credit, values, decode=decode)

    def save(self, step: int, improved: bool) -> None:
        """Writes a checkpoint and the report."""
        self.logger.sync()
        checkpoint.save(
            self.checkpoints,
            step,
            policy=self.agent.model,
            tokenizer=self.agent.tokenizer,
            critic=self.agent.critic,
            optimizers=self.optimizers,
            state=self.state,
            texts=self.describe(step) if self.world.main else None,
            improved=improved,
            keep=self.config.run.keep,
            world=self.world,
        )
        self.kept, self.kept_at = step, time.monotonic()
        if self.world.main:
            report.build(self.folder)

    def describe(self, step: int) -> dict[str, str]:
        """What a checkpoint's reader needs: its model card and its configuration."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        data = self.games.family.describe_data()
        card = model_card.build(self.config, step, rows, self.agent.model, data)
        return {"README.md": card, CHECKPOINT_CONFIG: format_config(self.config)}

    def report(self) -> None:
        if self.world.main:
            self.logger.message(f"report: {report.build(self.folder)}")


@contextlib.contextmanager
def open_session(config: Config, world: World, stopping: Stopping) -> Iterator[Session]:
    """The run as it stands before its first, or next, update."""
    refuse_own_weights(config)
    folder, saved, changes = world.first(lambda: find_run_folder(config)), None, []
    with contextlib.ExitStack() as stack:
        if config.run.resume:
            stack.enter_context(hold_run(folder, world))
            saved, changes = world.first(lambda: check_run(config, folder))
        with stopping.at_once(), naming_others(saved):
            session = prepare(config, world, stopping, stack)
            session.saved = saved
            if saved:
                restore(session, folder)
        if config.run.resume_from is not None and world.main:
            set_aside(folder, session.done)
        if not config.run.resume:
            folder = world.first(lambda: make_run_folder(config))
            stack.enter_context(hold_run(folder, world))
        session.folder, config.run.name = folder, folder.name
        session.logger = stack.enter_context(open_logger(session))
        begin(session, changes)
        yield session


def hold_run(folder: Path, world: World) -> contextlib.AbstractContextManager[None]:
    if not world.main:
        return contextlib.nullcontext()
    return hold(folder, "run", "stop it, or give this one a --name of its own")


def check_run(config: Config, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that a resumed run goes on from, and the options that it changes; refuses what cannot go on."""
    saved = find_start(config, folder)
    with naming_others(saved):
        changes = list_changes(config, folder, saved)
    if saved:
        check_metrics(folder, checkpoint.step_of(saved))
    return saved, changes


def prepare(
    config: Config, world: World, stopping: Stopping, stack: contextlib.ExitStack
) -> Session:
    """What a run needs before it has a folder."""
    check_ahead(config, world.size)
    configure_torch(config.run)
    plan.check_here(config)
    demonstrations.check_file(config)
    trackers.check_installed(config.run.track)
    games = Games(config)
    family = games.family
    agent = load_agent(
        config.model,
        config.run.seed,
        family.tokenizer,
        vocabulary=family.list_words,
        speech=config.agent,
        world=world,
    )
    prompter = make_prompter(agent.tokenizer, config.agent, family)
    estimate = estimators.find(config.advantage.estimator)
    if config.rollout.ahead:
        rollouts = contextlib.closing(Ahead(agent, family, prompter, config))
    else:
        rollouts = open_rollouts(agent, family, prompter, config)
    rollouts = stack.enter_context(rollouts)
    return Session(config, world, games, agent, prompter, rollouts, estimate, stopping)


def restore(session: Session, folder: Path) -> None:
    """Puts everything back as the checkpoint has it."""
    config, agent, world, saved = session.config, session.agent, session.world, session.saved
    state = checkpoint.read_state(saved)
    wrong = [key for key in session.state if not isinstance(state.get(key, 0), int | float)]
    if wrong:
        file = saved / "state.json"
        raise CheckpointError(f"{file} is corrupt: {wrong[0]} is no number; use another checkpoint")
    if config.warm_start.enabled == "yes" and config.train.kl_coef:
        load_reference(agent.model, folder / REFERENCE, state)
    add_networks(session)
    networks = {"policy": agent.model, "critic": agent.critic}
    session.state |= checkpoint.load(saved, **networks, optimizers=session.optimizers, world=world)
    session.done = session.kept = checkpoint.step_of(saved)


def begin(session: Session, changes: list[str]) -> None:
    """Tells what the run is; a new one, or one without a checkpoint, gets its first policy."""
    config, logger = session.config, session.logger
    if session.world.main:
        write_config(config, session.folder)
    if provenance := session.games.family.describe_data():
        logger.message(", ".join(f"{key}: {value}" for key, value in provenance.items()))
    if changes:
        logger.message(f"resumed with {', '.join(changes)}")
    critic_trains_trunk = (
        estimators.needs_values(session.estimate) and config.model.critic == "shared"
    )
    if critic_trains_trunk and max(config.train.value_coef) > MOST_SHARED:
        logger.message(
            f"train.value_coef above {MOST_SHARED} lets the value loss rule the trunk that "
            f"model.critic: shared trains with it; {MOST_SHARED} or less is usual"
        )
    agent = session.agent
    for text in judge_rates(config, agent.model.num_parameters(), lora=agent.lora):
        logger.message(text)
    if not session.saved:
        if config.warm_start.enabled == "yes":
            imitate(session)
        add_networks(session)
    for text in describe_computing(agent):
        logger.message(text)


def open_logger(session: Session) -> Logger | Muted:
    config = session.config
    if not session.world.main:
        return Muted()
    return Logger(
        session.folder,
        resume_step=session.done,
        display=config.run.display,
        total_steps=config.train.updates,
        track=config.run.track,
        options=flatten(config),
    )


def imitate(session: Session) -> None:
    """The warm start, whose policy is what the KL term refers to. Of many processes the first one makes it; a signal
    ends it for all."""
    agent, world = session.agent, session.world

    def attempt() -> bool:
        try:
            with session.stopping.at_once():
                warm_start(agent, session.games, session.prompter, session.config, session.logger)
        except Stop:
            return False
        return True

    if not world.first(attempt):
        session.stop()
    world.copy(agent.model)
    if world.main:
        session.state["reference"] = save_reference(agent.model, session.folder / REFERENCE)


def add_networks(session: Session) -> None:
    """Reference, critic and optimisers."""
    config, agent = session.config, session.agent
    if config.train.kl_coef:
        agent.freeze_reference()
    if estimators.needs_values(session.estimate):
        agent.add_critic()
    agent.shard()
    session.optimizers = build_optimizers(agent, config)
