"""What a run holds while it trains: games, networks, optimisers, and the folder where it keeps and tells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch.optim import Optimizer

from hiper_fast import estimators, plan
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.loading import load_agent
from hiper_fast.agent.runtime import configure_torch
from hiper_fast.config import Config
from hiper_fast.distributed import World
from hiper_fast.envs.base import Environment
from hiper_fast.estimators import Estimator
from hiper_fast.learn.credit import Targets
from hiper_fast.learn.optim import build_optimizers
from hiper_fast.learn.warm_start import warm_start
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.trajectory import Trajectories
from hiper_fast.runs import checkpoint, model_card, report
from hiper_fast.runs.folder import (
    CHECKPOINT_CONFIG,
    find_run_folder,
    format_config,
    write_config,
)
from hiper_fast.runs.metrics import Logger, Muted, read_metrics
from hiper_fast.runs.rates import judge_rates
from hiper_fast.runs.viewer import write_episodes

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
    envs: list[Environment]  # this process's, of training
    agent: Agent
    prompter: Prompter
    estimate: Estimator
    folder: Path
    logger: Logger | Muted
    saved: Path | None  # the checkpoint that the run goes on from
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    state: dict = field(default_factory=lambda: {"best": -1.0, "skipped": 0})

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def first_step(self) -> int:
        return checkpoint.step_of(self.saved) + 1 if self.saved else 0

    @property
    def is_stuck(self) -> bool:
        return self.state["skipped"] >= self.config.train.max_skipped

    def count_skipped(self, losses: dict[str, float]) -> None:
        """Counts optimiser steps left out in a row."""
        skipped = self.state["skipped"] + losses["optim/skipped_steps"]
        self.state["skipped"] = 0 if "loss/policy" in losses else skipped

    def note_success(self, success: float) -> bool:
        """Whether it is the best so far."""
        improved = success > self.state["best"]
        self.state["best"] = max(self.state["best"], success)
        return improved

    def record(self, step: int, panel: Trajectories, batch: Batch | None) -> None:
        """Keeps some episodes for the report's viewer."""
        if not self.world.main:
            return
        episodes = self.folder / "episodes"
        write_episodes(episodes, step, "eval", panel)
        if batch:
            trajectories, targets = batch.trajectories, batch.targets
            values = targets.turn_values(trajectories.cu_tokens)
            write_episodes(episodes, step, "train", trajectories, targets.credit, values)

    def save(self, step: int, improved: bool) -> None:
        """Writes a checkpoint and the report."""
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
def open_session(config: Config, world: World) -> Iterator[Session]:
    """The run as it stands before its first, or next, update."""
    configure_torch(config.run)
    plan.check_here(config)
    games = Games(config)
    envs = games.make(len(world.share(range(config.train.episodes))))
    family = games.family
    agent = load_agent(
        config.model, config.run.seed, family.tokenizer, vocabulary=family.list_words, world=world
    )
    prompter = Prompter(agent.tokenizer, config.agent, family.styles[config.agent.style])
    prompter.check_room()
    estimate = estimators.find(config.advantage.estimator)
    folder = world.first(lambda: find_run_folder(config))
    saved = None
    if config.run.resume:
        saved = world.first(lambda: checkpoint.latest(folder / "checkpoints"))
    with open_logger(config, world, folder, saved) as logger:
        session = Session(
            config, world, games, envs, agent, prompter, estimate, folder, logger, saved
        )
        config.run.name = folder.name
        if world.main:
            write_config(config, folder)
        if provenance := family.describe_data():
            logger.message(", ".join(f"{key}: {value}" for key, value in provenance.items()))
        for text in judge_rates(config, agent.model.num_parameters(), lora=agent.lora):
            logger.message(text)
        start_policy(session)
        add_networks(session)
        yield session


def open_logger(config: Config, world: World, folder: Path, saved: Path | None) -> Logger | Muted:
    if not world.main:
        return Muted()
    return Logger(
        folder,
        resume_step=checkpoint.step_of(saved) if saved else None,
        display=config.run.display,
        total_steps=config.train.updates,
    )


def start_policy(session: Session) -> None:
    """Gives the policy the weights it starts from, which the KL term refers to: the warm start's, if any."""
    reference, world = session.folder / "reference.safetensors", session.world
    config, agent, logger = session.config, session.agent, session.logger
    if session.saved and reference.exists():
        load_model(agent.model, reference)
    elif not session.saved and config.warm_start.enabled == "yes":
        world.first(lambda: warm_start(agent, session.games, session.prompter, config, logger))
        world.copy(agent.model)
        if world.main:
            save_model(agent.model, reference)


def add_networks(session: Session) -> None:
    """Reference, critic and optimisers; then all as the checkpoint has them."""
    config, agent = session.config, session.agent
    if config.train.kl_coef:
        agent.freeze_reference()
    if estimators.needs_values(session.estimate):
        agent.add_critic()
        if config.model.critic == "shared" and max(config.train.value_coef) > MOST_SHARED:
            session.logger.message(
                f"train.value_coef above {MOST_SHARED} lets the value loss rule the trunk that "
                f"model.critic: shared trains with it; {MOST_SHARED} or less is usual"
            )
    agent.shard()
    session.optimizers = build_optimizers(agent, config)
    if session.saved:
        networks = {"policy": agent.model, "critic": agent.critic}
        session.state = checkpoint.load(
            session.saved, **networks, optimizers=session.optimizers, world=session.world
        )
