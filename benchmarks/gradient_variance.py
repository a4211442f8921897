"""How much gradients differ between batches under HAE's and flat GAE's credit: the tiny policy on household games.

python benchmarks/gradient_variance.py       # some minutes of one core

A short warm start, then updates of the critic alone: one critic learns HAE's returns, a copy flat GAE's, from the same
episodes. The policy stays as it is; of each further batch of episodes every kind of credit gives a gradient. It is the
trainer's, without its KL and entropy terms, and so not its clipping either: a batch is used once.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hiper_fast import estimators
from hiper_fast.agent.agent import Agent, Critic
from hiper_fast.agent.loading import load_agent
from hiper_fast.bench import describe_machine
from hiper_fast.config import Config
from hiper_fast.configure import resolve
from hiper_fast.learn.credit import Targets, give_credit
from hiper_fast.learn.optim import build_adamw, set_lr
from hiper_fast.learn.score import score
from hiper_fast.learn.shaping import shape
from hiper_fast.learn.update import Seen, Step, update
from hiper_fast.learn.warm_start import warm_start
from hiper_fast.rollout.engines.paged import Engine
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Draw, Rollouts
from hiper_fast.rollout.prompter import make_prompter
from hiper_fast.rollout.trajectory import Trajectories
from hiper_fast.runs.metrics import Muted

RESULTS = Path(__file__).resolve().parent / "results" / "gradient-variance.json"
CRITICS = "hae", "gae"
LEVELS = "low", "high", "switch"
UNBIASED = "flat GAE, lambda 1"  # whatever its critic says


@dataclass
class Bench:
    config: Config
    games: Games
    agent: Agent
    rollouts: Rollouts
    critics: dict[str, Critic]

    def play(self, purpose: str, seed: int) -> Trajectories:
        """A batch of new games."""
        tasks = self.games.draw(purpose, self.config.train.episodes)
        played = self.rollouts.play(Draw(tasks, self.config.agent.temperature, seed))
        shape(played, self.config)
        return played

    def credit(self, trajectories: Trajectories, critic: str, **options) -> Targets:
        """What the update would learn from, by the estimator that the critic learned with."""
        self.agent.critic = self.critics[critic]
        scores = score(self.agent, trajectories, self.config)
        advantage = replace(self.config.advantage, estimator=critic, **options)
        return give_credit(trajectories, scores, estimators.find(critic), advantage)

    def teach(self, trajectories: Trajectories, critic: str, optimizer, seed: int) -> dict:
        """One update of that critic alone."""
        targets = self.credit(trajectories, critic)
        optimizers = {"policy": torch.optim.SGD(self.agent.model.parameters()), "critic": optimizer}
        generator = torch.Generator().manual_seed(seed)
        return update(
            self.agent,
            optimizers,
            trajectories,
            targets,
            self.config,
            generator,
            train_policy=False,
        )

    def find_gradient(self, trajectories: Trajectories, targets: Targets) -> Tensor:
        """The policy's, of all of the batch in one step: [weights]."""
        agent, sequences = self.agent, trajectories.sequences()
        agent.critic = None
        agent.model.zero_grad()
        every = torch.arange(len(sequences))
        seen = Seen.nothing(trajectories, agent.device)
        step = Step(agent, trajectories, sequences, targets, every, self.config, True, seen)
        for batch, rows in step.batches:
            step.add_gradients(batch, rows)
        return torch.cat([p.grad.flatten() for p in agent.model.parameters()])


def open_bench(config: Config) -> Bench:
    games = Games(config)
    agent = load_agent(config.model, config.run.seed, games.family.tokenizer)
    prompter = make_prompter(agent.tokenizer, config.agent, games.family)
    warm_start(agent, games, prompter, config, Muted())
    rollouts = Rollouts(agent, Engine(agent, config), (), games.family, prompter, config)
    critic = agent.add_critic()
    return Bench(config, games, agent, rollouts, {name: copy.deepcopy(critic) for name in CRITICS})


def teach_critics(bench: Bench, updates: int) -> dict[str, float]:
    """Explained variance of what each critic learns, in the last of its updates."""
    options = bench.config.train
    optimizers = {
        name: build_adamw(critic.parameters(), options, betas=(0.9, options.beta2), eps=options.eps)
        for name, critic in bench.critics.items()
    }
    explained = {}
    for number in range(updates):
        trajectories = bench.play(f"critic {number}", number)
        for name, optimizer in optimizers.items():
            set_lr(optimizer, options.critic_lr)
            metrics = bench.teach(trajectories, name, optimizer, number)
            explained |= {
                f"{name} {key.removeprefix('value/explained_')}": round(value, 3)
                for key, value in metrics.items()
                if key.startswith("value/explained")
            }
    return explained


def find_gradients(bench: Bench, trajectories: Trajectories) -> dict[str, Tensor]:
    """A batch's gradients [weights] by kind of credit. HAE's is the sum of its levels', for a ratio of 1 is linear."""
    hae = bench.credit(trajectories, "hae")
    found = {}
    for name, level in zip(LEVELS, hae.credit.levels, strict=True):
        found[f"HAE, {name} level alone"] = bench.find_gradient(
            trajectories, keep_level(trajectories, hae, level)
        )
    low, high, switch = found.values()
    found |= {"HAE": low + high + switch, "HAE without its switch level": low + high}
    for lambda_ in (0.95, 1.0):
        targets = bench.credit(trajectories, "gae", lambda_segment=lambda_)
        found[f"flat GAE, lambda {lambda_:g}"] = bench.find_gradient(trajectories, targets)
    return found


def keep_level(trajectories: Trajectories, targets: Targets, level: estimators.Level) -> Targets:
    """The tokens' advantages of one level (normalised already), the loss mask as it is."""
    turn = torch.arange(trajectories.turns).repeat_interleave(trajectories.cu_tokens.diff())
    trained = ((trajectories.roles & level.roles) > 0) & level.carried[turn]  # [tokens]
    return replace(targets, advantages=torch.where(trained, level.advantages[turn], 0.0))


def describe(gradients: Tensor, unbiased: Tensor) -> dict[str, float | None]:
    """Of gradients [batches, weights]: the mean cosine of two batches', with its standard error (jackknife); the
    variance over the squared norm of the mean; and the cosine of that mean to the mean of `unbiased`, of the same
    batches. All products are of different batches, so that noise is in no mean; None where no mean stands out of it.
    """
    gradients, unbiased = gradients.double(), unbiased.double()
    norms = gradients.norm(dim=1)
    cosines = gradients @ gradients.T / norms[:, None] / norms
    batches = torch.arange(len(gradients))
    left_out = torch.stack([
        average_pairs(cosines[batches != i][:, batches != i]) for i in batches
    ])  # fmt: skip
    error = (left_out.var(correction=0) * (len(batches) - 1)).sqrt()
    signal = average_pairs(gradients @ gradients.T)  # |E g|^2
    other = average_pairs(unbiased @ unbiased.T)
    shared = average_pairs(gradients @ unbiased.T)
    known, comparable = signal > 0, min(signal, other) > 0
    return {
        "cosine": round(average_pairs(cosines).item(), 4),
        "cosine_error": round(error.item(), 4),
        "relative_variance": round((norms.square().mean() / signal - 1).item(), 2)
        if known
        else None,
        "to_unbiased": round((shared / (signal * other).sqrt()).item(), 2) if comparable else None,
    }


def average_pairs(products: Tensor) -> Tensor:
    """The mean of [batches, batches] off the diagonal."""
    count = len(products)
    return (products.sum() - products.diagonal().sum()) / (count * (count - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10, help="batches of episodes [10]")
    parser.add_argument("--episodes", type=int, default=64, help="episodes of each [64]")
    parser.add_argument("--warm-start", type=int, default=400, help="scripted episodes [400]")
    parser.add_argument("--critic-updates", type=int, default=5, help="before the batches [5]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.process_time()
    config = resolve(given={
        "env.name": "household", "model.device": "cpu", "run.seed": arguments.seed,
        "warm_start.episodes": arguments.warm_start, "train.episodes": arguments.episodes,
        "train.kl_coef": 0, "train.entropy_coef": 0,
    })  # fmt: skip
    bench = open_bench(config)
    explained = teach_critics(bench, arguments.critic_updates)
    gradients: dict[str, list[Tensor]] = {}
    won = []
    for number in range(arguments.batches):
        trajectories = bench.play(f"batch {number}", 1000 + number)
        won.append(trajectories.won.float().mean().item())
        for name, gradient in find_gradients(bench, trajectories).items():
            gradients.setdefault(name, []).append(gradient)
        print(f"batch {number + 1} of {arguments.batches}", flush=True)
    results = {
        "date": datetime.date.today().isoformat(),
        "versions": describe_machine(),
        "options": {key: value for key, value in vars(arguments).items() if key != "out"},
        "processor_seconds": round(time.process_time() - began),
        "success": round(sum(won) / len(won), 3),
        "explained": explained,
        "gradients": {
            name: describe(torch.stack(found), torch.stack(gradients[UNBIASED]))
            for name, found in gradients.items()
        },
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
