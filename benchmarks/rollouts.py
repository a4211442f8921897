"""Tokens a second of what can answer prompts: our engines by name, and transformers' two ways as peers.

python benchmarks/rollouts.py [--engines paged,vllm] [--episodes 128] [--model tiny] [--threads 1] [--rounds 3]

All sample at temperature 1 with the same weights. First a response to the first prompt of each episode of household
games: `generate` reads them as one left-padded batch, `continuous` is transformers' continuous batching. Then, by the
engines, whole episodes, environments included. Of the rounds, after one that is not timed, the one counts with the
most tokens a second of processor time. Who draws otherwise samples other responses: compare tokens a second. With the
tiny model's random weights most responses are as long as they may be; a trained checkpoint gives lengths as they are.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hiper_fast.agent.agent import Agent
from hiper_fast.agent.loading import load_agent
from hiper_fast.agent.runtime import configure_torch
from hiper_fast.config import Config
from hiper_fast.configure import resolve
from hiper_fast.envs.family import Task, families
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines import Request
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Draw, open_rollouts
from hiper_fast.rollout.prompter import Prompter, make_prompter

Respond = Callable[[int], int]  # a seed -> sampled tokens
TITLES = "{:12}{:>9}{:>9}{:>9}{:>11}{:>11}"
LINE = "{:12}{:9}{:9}{:9.2f}{:11.2f}{:11.0f}"


@dataclass
class Measured:
    sampled: int  # tokens
    seconds: float
    processor: float  # seconds, of all threads


@dataclass
class Case:
    agent: Agent
    config: Config
    games: Games
    tasks: list[Task]
    prompter: Prompter
    prompts: list[list[int]]  # token ids, of each episode's first turn


def main() -> None:
    arguments = read_arguments()
    print(TITLES.format("first turns", "prompt", "sampled", "seconds", "processor", "sampled/s"))
    for name in [*arguments.engines.split(","), *PEERS]:
        case = make_case(arguments, "paged" if name in PEERS else name)
        read = sum(map(len, case.prompts))
        with PEERS.get(name, run_engine)(case) as respond:
            found = measure(respond, arguments.rounds)
        print_line(name, read, found)
    print()
    print(TITLES.format("episodes", "turns", "sampled", "seconds", "processor", "sampled/s"))
    for name in arguments.engines.split(","):
        case = make_case(arguments, name)
        print_line(name, *play(case, arguments.rounds))


def print_line(name: str, size: int, found: Measured) -> None:
    rate = found.sampled / found.processor
    print(LINE.format(name, size, *astuple(found), rate), flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", default="paged", help="names, with commas between them")
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def make_case(arguments: argparse.Namespace, engine: str) -> Case:
    given = {
        "env.name": "household",
        "model.path": arguments.model,
        "model.device": "cpu",
        "run.threads": arguments.threads,
        "rollout.engine": engine,
    }
    config = resolve(given=given)
    configure_torch(config.run)
    agent = load_agent(config.model, 0, families.find("household").tokenizer)
    games = Games(config)
    prompter = make_prompter(agent.tokenizer, config.agent, games.family)
    tasks = games.draw("benchmark", arguments.episodes)
    plays = [Play(games.family.make(), task, games.family, config).begin() for task in tasks]
    prompts = [ids for ids, _ in prompter([play.state for play in plays])]
    return Case(agent, config, games, tasks, prompter, prompts)


def measure(respond: Respond, rounds: int) -> Measured:
    """The round with the most tokens a second of the processor, which others that run here change least."""
    respond(0)
    found = []
    for seed in range(1, rounds + 1):
        begin, processor = time.perf_counter(), time.process_time()
        sampled = respond(seed)
        seconds = time.perf_counter() - begin
        found.append(Measured(sampled, seconds, time.process_time() - processor))
    return min(found, key=lambda each: each.processor / each.sampled)


def play(case: Case, rounds: int) -> tuple[int, Measured]:
    """Turns of whole episodes (of the last round), and what they took."""
    with open_rollouts(case.agent, case.games.family, case.prompter, case.config) as rollouts:
        played = []

        def respond(seed: int) -> int:
            played.append(rollouts.play(Draw(case.tasks, temperature=1.0, seed=seed)))
            return played[-1].response_ids.numel()

        found = measure(respond, rounds)
    return played[-1].turns, found


@contextmanager
def run_engine(case: Case) -> Iterator[Respond]:
    engine = engines.find(case.config.rollout.engine)(case.agent, case.config)
    count = len(case.prompts)

    def respond(seed: int) -> int:
        waiting, answers = list(enumerate(case.prompts)), []
        engine.wake()
        engine.update()
        while len(answers) < count:
            while waiting and count - len(waiting) - len(answers) < engine.capacity:
                key, ids = waiting.pop()
                engine.submit(key, Request(ids, seed=seed * count + key, temperature=1.0))
            answers += engine.collect()
        engine.sleep()
        return sum(len(answer.ids) for _, answer in answers)

    yield respond
    engine.close()


@contextmanager
def run_generate(case: Case) -> Iterator[Respond]:
    model, options = make_peer(case)
    width = max(map(len, case.prompts))
    pad = options.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in case.prompts])
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in case.prompts]
    )

    def respond(seed: int) -> int:
        torch.manual_seed(seed)
        said = model.generate(ids, attention_mask=mask, generation_config=options)[:, width:]
        ended = torch.isin(said, torch.tensor(options.eos_token_id)).int().cumsum(1)
        return int((ended.cumsum(1) <= 1).sum())

    yield respond


@contextmanager
def run_continuous(case: Case) -> Iterator[Respond]:
    model, options = make_peer(case)
    # By default its cache takes nearly all memory there is, and then its masks need more.
    memory = ContinuousBatchingConfig(num_blocks=4 * len(case.prompts), max_batch_tokens=2048)
    with model.continuous_batching_context_manager(
        generation_config=options, continuous_batching_config=memory
    ) as manager:

        def respond(seed: int) -> int:
            torch.manual_seed(seed)
            manager.add_requests(case.prompts, max_new_tokens=options.max_new_tokens)
            lengths: list[int] = []
            while len(lengths) < len(case.prompts):
                result = manager.get_result(timeout=60)
                if result is None or result.error:
                    raise RuntimeError(f"continuous batching gave no answer: {result}")
                lengths += [len(result.generated_tokens)] if result.is_finished() else []
            return sum(lengths)

        yield respond


def make_peer(case: Case) -> tuple[PreTrainedModel, GenerationConfig]:
    """The model with transformers' own attention, and how it samples."""
    agent = case.agent
    model = copy.deepcopy(agent.model)
    model.set_attn_implementation("sdpa")
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.config.agent.max_response_tokens,
        eos_token_id=list(agent.stop_ids),
        pad_token_id=agent.tokenizer.pad_token_id,
    )
    return model, options


PEERS = {"generate": run_generate, "continuous": run_continuous}


if __name__ == "__main__":
    main()
