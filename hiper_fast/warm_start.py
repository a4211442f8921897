"""Imitation of scripted episodes, so that a model from scratch speaks the format and knows the commands."""

from __future__ import annotations

import math
import random
import time

import torch

from hiper_fast import optim
from hiper_fast.batch import microbatches
from hiper_fast.config import Config
from hiper_fast.expert import Move
from hiper_fast.games import Games
from hiper_fast.hiper import HIGH, Rows
from hiper_fast.metrics import Logger
from hiper_fast.policy import Agent
from hiper_fast.prompt import Prompter
from hiper_fast.rollout import Play, rollout
from hiper_fast.trajectory import Trajectories, pack

AT_ONCE = 128  # scripted episodes played in step: a large room with all it can do takes megabytes


def warm_start(agent: Agent, games: Games, prompter: Prompter, config: Config, logger: Logger) -> bool:
    """Demonstrations, then imitation, the run's first stage; False, and nothing done, for models that need none."""
    if not wanted(config.warm_start.enabled, agent):
        return False
    with logger.stage("demonstrations"):
        trajectories, imitated = demonstrate(agent, games, prompter, config)
    won = trajectories.won.float().mean().item()
    logger.message(f"{len(trajectories.won)} scripted episodes, {trajectories.turns} turns, {won:.0%} won")
    began = time.perf_counter()
    for step, steps, loss, accuracy in imitate(agent, trajectories, imitated, config):
        if step % max(1, steps // 20) == 0 or step == steps:
            metrics = {
                "loss/imitation": loss,
                "warm_start/accuracy": accuracy,
                "time/total": time.perf_counter() - began,
            }
            logger.log(step, "warm_start", metrics)
    return True


def wanted(option: str, agent: Agent) -> bool:
    """What yes, no and auto, which is for the tiny model only, mean for this one."""
    return option == "yes" or (option == "auto" and agent.tiny)


def response_text(move: Move, subgoal: str | None) -> str:
    """The response that makes `move` while `subgoal` is the current one."""
    switch = "KEEP" if move.subgoal == subgoal else "SWITCH"
    return f"<switch>{switch}</switch><subgoal>{move.subgoal}</subgoal><action>{move.action}</action>"


def demonstrate(agent: Agent, games: Games, prompter: Prompter, config: Config) -> tuple[Trajectories, torch.Tensor]:
    """Scripted episodes and bool [turns]: which turns are to be imitated.

    On a share `warm_start.noise` of the turns the expert stumbles, so that imitation also sees how to go on from a
    mistake; those turns are stored, and imitated with `warm_start.imitate_noise`.
    """
    c = config.warm_start
    rng = random.Random(f"{config.run.seed} demonstrations")
    imitate_noise = wanted(c.imitate_noise, agent)

    def respond(plays: list[Play]):
        texts = []
        for play in plays:
            expert, marks = players[id(play)]
            last = play.state.history[-1][1] if play.state.history else None
            expert.observe(last, play.state.observation, play.state.commands)
            move = expert.move(play.state.commands)
            stumbles = c.demonstrations == "search" and rng.random() < c.noise
            marks.append(imitate_noise or not stumbles)
            if stumbles:
                move = expert.stumble(move, play.state.commands, rng)
            texts.append(response_text(move, play.state.subgoal))
        ids = agent.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [(row + [agent.stop_ids[0]], [0.0] * (len(row) + 1)) for row in ids]

    tasks, envs = games.training("warm start", c.episodes), games.make(min(c.episodes, AT_ONCE))
    episodes, imitated = [], []
    for start in range(0, len(tasks), AT_ONCE):
        plays = [Play(env, task, config) for env, task in zip(envs, tasks[start : start + AT_ONCE], strict=False)]
        players = {
            id(p): (games.family.player(c.demonstrations, p.env, random.Random(rng.random())), []) for p in plays
        }
        episodes += rollout(plays, prompter, respond, agent.decode)
        imitated += [mark for p in plays for mark in players[id(p)][1]]
    return pack(episodes, agent.find_roles), torch.tensor(imitated)


def imitate(agent: Agent, t: Trajectories, imitated: torch.Tensor, config: Config):
    """Trains the policy on the responses of the turns `imitated`; yields (step, steps, loss, accuracy) of each.

    Where turns continue each other a step takes whole trajectories, as many as have about `batch_turns` such turns.
    """
    c = config.warm_start
    generator = torch.Generator().manual_seed(config.run.seed)
    optimizers = optim.imitation(agent, config.train)
    loss_mask = imitated.repeat_interleave(t.cu_tokens.diff())
    sequences = t.sequences()
    owners = torch.searchsorted(sequences.cu_seqlens.long(), sequences.value_index[imitated, HIGH], right=True) - 1
    chosen = owners.unique()
    size = max(1, c.batch_turns * len(chosen) // max(1, len(owners)))
    parts = [p for _ in range(c.epochs) for p in chosen[torch.randperm(len(chosen), generator=generator)].split(size)]
    for number, part in enumerate(parts, 1):
        progress = number / len(parts)
        lr = c.lr * min(1.0, 20 * progress) * (0.55 + 0.45 * math.cos(math.pi * progress))
        agent.model.zero_grad(set_to_none=True)
        batches = [
            (batch, Rows(sequences, batch, loss_mask))
            for batch in microbatches(sequences.ids, sequences.cu_seqlens, config.train.microbatch_tokens, part)
        ]
        tokens = sum(rows.tokens.numel() for _, rows in batches)
        total, correct = 0.0, 0
        for batch, rows in batches:
            hidden = agent.trunk(batch.to(agent.device))[rows.token_rows]
            logprobs = agent.logprobs(hidden, t.response_ids[rows.tokens].to(agent.device), 1.0)
            loss = -logprobs.sum() / tokens
            loss.backward()
            total += loss.item()
            correct += int((logprobs.detach() > math.log(0.5)).sum())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"imitation: the loss became {total} in step {number}; lower warm_start.lr ({c.lr})"
            )
        torch.nn.utils.clip_grad_norm_(agent.model.parameters(), config.train.grad_clip or math.inf)
        for optimizer, share in optimizers:
            optim.set_lr(optimizer, share * lr)
            optimizer.step()
        yield number, len(parts), total, correct / tokens
