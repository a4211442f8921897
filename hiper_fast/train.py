"""Train an agent with HiPER, from the warm start to the report.

python -m hiper_fast.train                      # embedded default: household games, a tiny model, this machine
ALFWORLD_DATA=... python -m hiper_fast.train    # the official ALFWorld games
python -m hiper_fast.train --env webshop        # a generated shop; WEBSHOP_DATA=... the real one
python -m hiper_fast.train --model Qwen/Qwen2.5-1.5B-Instruct --config my.yaml --train.lr 1e-6
python -m hiper_fast.train --config alfworld --plan    # the memory and time that this would need, and no more
torchrun --nproc-per-node 8 -m hiper_fast.train …  # the same on 8 GPUs
"""

from __future__ import annotations

import copy
import sys
import time

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from hiper_fast import checkpoint, distributed, hiper, optim, plan, report
from hiper_fast.config import Config, ConfigError, environment, parse, prompt_style, run_folder, write_file
from hiper_fast.distributed import World
from hiper_fast.envs.pddl import GameError
from hiper_fast.eval import evaluate
from hiper_fast.games import Games
from hiper_fast.metrics import Logger, Muted
from hiper_fast.policy import configure_torch, load
from hiper_fast.prompt import Prompter
from hiper_fast.rollout import played, summary
from hiper_fast.viewer import write_episodes
from hiper_fast.warm_start import warm_start


def train(config: Config, world: World) -> None:
    """One run: warm start, then updates of rollout -> values -> HAE -> PPO, with evaluations and checkpoints."""
    configure_torch(config.run)
    plan.check_here(config)
    games = Games(config)
    envs = games.make(len(world.share(range(config.train.episodes))))
    agent = load(config.model, config.run.seed, games.family.tokenizer, world)
    prompter = Prompter(agent.tokenizer, config.agent, prompt_style(config), games.family.styles)
    folder = world.first(lambda: run_folder(config))
    checkpoints, episodes = folder / "checkpoints", folder / "episodes"
    reference = folder / "reference.safetensors"
    saved = world.first(lambda: checkpoint.latest(checkpoints)) if config.run.resume else None
    start = checkpoint.step_of(saved) if saved else None
    c = config.train

    options = {"resume_step": start, "display": config.run.display, "total_steps": c.updates}
    with Logger(folder, **options) if world.main else Muted() as logger:
        if world.main:
            write_file(resolved(config), folder / "config.yaml")
        if provenance := games.family.provenance():
            logger.message(", ".join(f"{key}: {value}" for key, value in provenance.items()))
        if saved and reference.exists():
            load_model(agent.model, reference)
        elif not saved and world.first(lambda: warm_start(agent, games, prompter, config, logger)):
            world.copy(agent.model)
            if world.main:
                save_model(agent.model, reference)
        if c.kl_coef:
            agent.freeze_reference()
        agent.add_critic()
        agent.shard()
        if config.model.critic == "shared" and max(c.value_coef) > 0.1:
            logger.message("train.value_coef above 0.1 lets the value loss rule the trunk that model.critic: shared "
                           "trains with it; 0.1 or less is usual")  # fmt: skip
        optimizers = optim.build(agent, config)
        state = {"best": -1.0, "skipped": 0}
        if saved:
            networks = {"policy": agent.model, "critic": agent.critic}
            state = checkpoint.load(saved, **networks, optimizers=optimizers, world=world)

        for step in range(0 if start is None else start + 1, c.updates + 1):
            if step > 0:
                began = time.perf_counter()
                with logger.stage("rollout"):
                    tasks = games.training(f"update {step}", c.episodes)
                    seed = seed_of(config, step)
                    t = played(agent, envs, tasks, prompter, config, config.agent.temperature, seed)
                with logger.stage("advantages"):
                    if config.advantage.malformed:
                        hiper.train_malformed(t)
                    t.rewards = hiper.shape_rewards(t, config.reward)
                    targets = hiper.estimate(t, *hiper.score(agent, t, config), config.advantage)
                with logger.stage("update"):
                    generator = torch.Generator().manual_seed(seed)
                    learned = step - c.critic_updates  # the policy's updates so far, this one included
                    share = 1 - (1 - c.final_lr) * step / c.updates
                    optim.set_lr(optimizers["policy"], c.lr * share * min(1.0, learned / max(1, c.warmup_updates)))
                    optim.set_lr(optimizers["critic"], c.critic_lr * share)
                    losses = hiper.update(agent, optimizers, t, targets, config, generator, train_policy=learned > 0)
                counts = {"episodes": step * c.episodes, "time/total": time.perf_counter() - began}
                logger.log(step, "train", summary(t) | losses | counts)
                state["skipped"] = 0 if "loss/policy" in losses else state["skipped"] + losses["optim/skipped_steps"]

            stop = state["skipped"] >= c.max_skipped
            last = step == c.updates or stop
            improved = False
            if step % config.eval.every == 0 or last:
                metrics, panel = evaluate(agent, games, prompter, config)
                improved = metrics["eval/success"] > state["best"]
                state["best"] = max(state["best"], metrics["eval/success"])
                logger.log(step, "eval", metrics)
                if world.main:
                    write_episodes(episodes, step, "eval", panel)
                    if step > 0:
                        write_episodes(episodes, step, "train", t, targets)
            if step % config.run.save_every == 0 or improved or last:
                checkpoint.save(checkpoints, step, policy=agent.model, tokenizer=agent.tokenizer, critic=agent.critic,
                                optimizers=optimizers, state=state, improved=improved, keep=config.run.keep,
                                world=world)  # fmt: skip
                if world.main:
                    report.build(folder)
            if stop:
                raise FloatingPointError(
                    f"the loss was not finite in {state['skipped']} steps in a row, so the run saved its state and "
                    f"stopped; lower train.lr (now {c.lr}) and continue with --resume --name {folder.name}"
                )
        if world.main:
            logger.message(f"report: {report.build(folder)}")


def resolved(config: Config) -> Config:
    """What the run's folder keeps: later readers play the same games in the same style, and do not resume."""
    config = copy.deepcopy(config)
    config.env.name, config.agent.style, config.run.resume = environment(config), prompt_style(config), False
    return config


def seed_of(config: Config, step: int) -> int:
    """The seed of an update's sampling: a resumed run draws what the uninterrupted one would have drawn."""
    return config.run.seed * 1_000_003 + step


def main(argv: list[str] | None = None) -> int:
    config = parse(argv, program="train", description=__doc__)
    try:
        if config.plan.show:
            plan.show(config)
        else:
            with distributed.started(config) as world:
                train(config, world)
    except (ConfigError, GameError, checkpoint.CheckpointError, FloatingPointError, OSError, SafetensorError) as error:
        print(f"python -m hiper_fast.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; continue from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
