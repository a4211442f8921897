"""Imitation of shown episodes, so that a model from scratch speaks the format and knows the commands."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config
from hiper_fast.envs.base import GameError
from hiper_fast.envs.family import Family
from hiper_fast.envs.player import Move, Player
from hiper_fast.envs.prompts import State
from hiper_fast.estimators import HIGH
from hiper_fast.learn import optim
from hiper_fast.learn.demonstrations import (
    Replay,
    check_unseen,
    is_file,
    read_demonstrations,
    write_blocks,
)
from hiper_fast.learn.rows import Rows, divide
from hiper_fast.packing import find_ranges
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Seats, Stage, Written
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.trajectory import Episode, Sequences, Trajectories, pack
from hiper_fast.runs.metrics import Logger

AT_ONCE = 128  # shown episodes played in step: a large room with all it can do takes megabytes
RISE = 20  # the learning rate is at its height after a twentieth of the steps
ROWS = 20  # metrics of a warm start


class Imitation(NamedTuple):
    """One step of it."""

    step: int
    steps: int
    loss: float  # nats per token
    accuracy: float  # share of tokens given more than a half


def warm_start(
    agent: Agent, games: Games, prompter: Prompter, config: Config, logger: Logger
) -> None:
    """Demonstrations, then imitation, the run's first stage."""
    with logger.stage("demonstrations"):
        trajectories, weights, told = show(agent, games, prompter, config)
    won, count = trajectories.won.float().mean().item(), len(trajectories.won)
    text = f"{count} episodes shown, {trajectories.turns} turns, {won:.0%} won"
    if told:
        teacher = told["warm_start/teacher"]
        text += f"; undisturbed, their player wins {teacher:.1%} of the {config.eval.panel} panel"
    logger.message(text)
    began = time.perf_counter()
    for step, steps, loss, accuracy in imitate(agent, trajectories, weights, config):
        if step % max(1, steps // ROWS) == 0 or step == steps:
            metrics = {
                "loss/imitation": loss,
                "warm_start/accuracy": accuracy,
                **told,
                "time/total": time.perf_counter() - began,
            }
            logger.log(step, "warm_start", metrics)


def show(
    agent: Agent, games: Games, prompter: Prompter, config: Config
) -> tuple[Trajectories, Tensor, dict[str, float]]:
    """The episodes to imitate, the weights [turns] of their turns, and what is known of who played them."""
    if is_file(config.warm_start.demonstrations):
        return *replay(agent, games, prompter, config), {}
    shown = demonstrate(agent, games, prompter, config)
    return *shown, {"warm_start/teacher": measure_teacher(games, config)}


def decide(player: Player, state: State) -> Move:
    """What a player does who has seen every turn so far."""
    last = state.history[-1][1] if state.history else None
    player.observe(last, state.observation, state.commands)
    return player.move(state.commands)


def write_response(move: Move, subgoal: str | None, *, plans: bool = True) -> str:
    """The response that makes `move` while `subgoal` is the current one; without plans the action alone."""
    return write_blocks(move.subgoal != subgoal, move.subgoal, move.action, plans=plans)


def demonstrate(
    agent: Agent, games: Games, prompter: Prompter, config: Config
) -> tuple[Trajectories, Tensor]:
    """Scripted episodes and bool [turns]: which turns are to be imitated.

    On a share `warm_start.noise` of the turns the expert stumbles, so that imitation also sees how to go
    on from a mistake; those turns are stored, and imitated with `warm_start.imitate_noise`.
    """
    tasks = games.draw("warm start", config.warm_start.episodes)
    envs = games.make(min(len(tasks), AT_ONCE))
    rng = random.Random(f"{config.run.seed} demonstrations")
    episodes, imitated = [], []
    for start in range(0, len(tasks), AT_ONCE):
        some = zip(envs, tasks[start : start + AT_ONCE], strict=False)
        plays = [Play(env, task, games.family, config).begin() for env, task in some]
        teacher = Teacher(agent, games.family, plays, config, rng)
        episodes += play_script(plays, prompter, teacher.respond, agent)
        imitated += teacher.marks()
    return pack(episodes, agent.find_roles), torch.tensor(imitated)


def replay(
    agent: Agent, games: Games, prompter: Prompter, config: Config
) -> tuple[Trajectories, Tensor]:
    """The episodes of the file, and float32 [turns]: each one's weight, over the mean of all."""
    shown = read_demonstrations(config)
    check_unseen(shown, games.list_panel())
    envs = games.make(min(len(shown), AT_ONCE))
    episodes, weights = [], []
    for start in range(0, len(shown), AT_ONCE):
        some = zip(envs, shown[start : start + AT_ONCE], strict=False)
        plays = [Replay(env, one, games.family, config).begin() for env, one in some]
        episodes += play_script(plays, prompter, lambda some: answer(agent, some), agent)
        weights += [p.shown.weight for p in plays for _ in p.episode.responses]
    weights = torch.tensor(weights)  # [turns]
    return pack(episodes, agent.find_roles), weights / weights.mean()


def play_script(
    plays: list[Play],
    prompter: Prompter,
    respond: Callable[[list[Play]], list[Answer]],
    agent: Agent,
) -> list[Episode]:
    """Episodes with answers that are at hand. GameError where an environment fails."""
    stage = Stage(Seats(None), prompter, Written(respond), agent.decode)
    if lost := stage.run(plays, at_once=len(plays)):
        raise GameError(f"warm start: {lost[0].text}")
    return [play.episode for play in plays]


def answer(agent: Agent, plays: list[Replay]) -> list[Answer]:
    return encode(agent, [play.speak() for play in plays])


def encode(agent: Agent, texts: list[str]) -> list[Answer]:
    """Responses that were written, as if they had been sampled."""
    ids = agent.tokenizer(texts, add_special_tokens=False)["input_ids"]
    stop = agent.stop_ids[0]
    return [Answer(row + [stop], [0.0] * (len(row) + 1)) for row in ids]


def measure_teacher(games: Games, config: Config) -> float:
    """The share of the evaluation panel that the scripted player wins when nothing makes it stumble."""
    [env], tasks, rng = games.make(1), games.list_panel(), random.Random("teacher")
    kind, won = config.warm_start.demonstrations, 0
    for task in tasks:
        play = Play(env, task, games.family, config).begin()
        player = games.family.make_player(kind, env, random.Random(rng.random()))
        while not play.over:
            text = write_response(decide(player, play.state), play.state.subgoal)
            play.step(Answer([], []), text.encode())
        won += play.episode.won
    return won / len(tasks)


class Teacher:
    """The scripted players of some plays, at the engine's place."""

    def __init__(
        self, agent: Agent, family: Family, plays: list[Play], config: Config, rng: random.Random
    ):
        self.agent, self.config, self.rng, self.plays = agent, config.warm_start, rng, plays
        self.players: dict[int, Player] = {}
        self.imitated: dict[int, list[bool]] = {}  # a mark a turn
        for play in plays:
            own = random.Random(rng.random())
            self.players[id(play)] = family.make_player(self.config.demonstrations, play.env, own)
            self.imitated[id(play)] = []

    def respond(self, plays: list[Play]) -> list[Answer]:
        return encode(self.agent, [self.speak(play) for play in plays])

    def speak(self, play: Play) -> str:
        player, state = self.players[id(play)], play.state
        move = decide(player, state)
        searches = self.config.demonstrations != "walkthrough"
        stumbles = searches and self.rng.random() < self.config.noise
        self.imitated[id(play)].append(self.config.imitate_noise == "yes" or not stumbles)
        if stumbles:
            move = player.stumble(move, state.commands, self.rng)
        return write_response(move, state.subgoal, plans=state.plans)

    def marks(self) -> list[bool]:
        """Of all turns, play by play: whether it is to be imitated."""
        return [mark for play in self.plays for mark in self.imitated[id(play)]]


def imitate(
    agent: Agent, trajectories: Trajectories, weights: Tensor, config: Config
) -> Iterator[Imitation]:
    """Trains the policy on the responses of the turns with `weights` [turns] above 0, a step at a time.

    A step's loss is the mean over its tokens, each times its turn's weight; bool marks are weights too. Where turns
    continue each other a step takes whole trajectories, as many as have about `batch_turns` such turns.
    """
    options = config.warm_start
    optimizers, imitated = optim.build_imitation_optimizers(agent, config.train), weights > 0
    weights = weights.float().repeat_interleave(trajectories.cu_tokens.diff())  # [tokens]
    sequences = trajectories.sequences()
    parts = draw_parts(sequences, imitated, config)
    for number, part in enumerate(parts, 1):
        progress = number / len(parts)
        rise = min(1.0, RISE * progress)
        lr = options.lr * rise * (0.55 + 0.45 * math.cos(math.pi * progress))
        agent.model.zero_grad(set_to_none=True)
        loss, accuracy = add_gradients(agent, trajectories, sequences, weights, part, config)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"imitation: the loss became {loss} in step {number}; lower warm_start.lr ({options.lr})"
            )
        clip_grad_norm_(agent.model.parameters(), config.train.grad_clip or math.inf)
        for optimizer, share in optimizers:
            optim.set_lr(optimizer, share * lr)
            optimizer.step()
        yield Imitation(number, len(parts), loss, accuracy)


def draw_parts(sequences: Sequences, imitated: Tensor, config: Config) -> list[Tensor]:
    """The sequences of each step, drawn from the run's seed."""
    options = config.warm_start
    generator = torch.Generator().manual_seed(config.run.seed)
    positions = sequences.value_index[imitated, HIGH]
    owners = find_ranges(positions, sequences.cu_seqlens)
    chosen = owners.unique()
    size = max(1, options.batch_turns * len(chosen) // max(1, len(owners)))
    parts = []
    for _ in range(options.epochs):
        parts += chosen[torch.randperm(len(chosen), generator=generator)].split(size)
    return parts


def add_gradients(
    agent: Agent,
    trajectories: Trajectories,
    sequences: Sequences,
    weights: Tensor,
    part: Tensor,
    config: Config,
) -> tuple[float, float]:
    """Those of one step's loss per token; returns it and the share of tokens given more than a half.

    weights: float32 [tokens]; tokens of weight 0 have no part in either.
    """
    batches = [
        (batch, Rows(sequences, batch, weights > 0))
        for batch in divide(agent, config, sequences.ids, sequences.cu_seqlens, part)
    ]
    tokens = sum(rows.tokens.numel() for _, rows in batches)
    sums = torch.zeros(2, dtype=torch.float64, device=agent.device)  # of the loss, and of tokens
    for batch, rows in batches:
        hidden = agent.trunk(batch.to(agent.device))[rows.token_rows]
        targets = trajectories.response_ids[rows.tokens].to(agent.device)
        logprobs = agent.logprobs(hidden, targets, 1.0)
        loss = -(logprobs * weights[rows.tokens].to(agent.device)).sum() / tokens
        loss.backward()
        sums[0] += loss.detach()
        sums[1] += (logprobs.detach() > math.log(0.5)).sum()
    total, correct = sums.tolist()
    return total, correct / tokens
