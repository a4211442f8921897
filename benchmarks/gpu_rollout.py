"""A HiPER rollout by the built-in engine, its parts, and an update: random weights, an environment that never ends.

`benchmarks/gpu.py` runs it. Prompts are random ids of ALFWorld's lengths, so nothing is shared but by chance; no token
ends a response. Environment and prompts cost nothing here.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from gpu_timing import attempt, count_launches, milliseconds
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from hiper_fast import estimators, plan
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.decoding import Entering
from hiper_fast.agent.footprint import find_architecture
from hiper_fast.agent.head import Head
from hiper_fast.agent.layers import recompute
from hiper_fast.agent.tiny import load_tokenizer
from hiper_fast.config import Config, EnvConfig
from hiper_fast.configure import resolve
from hiper_fast.envs.family import Family, families
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.optim import build_optimizers
from hiper_fast.learn.score import score
from hiper_fast.learn.shaping import shape
from hiper_fast.learn.update import update
from hiper_fast.rollout.draws import uniforms
from hiper_fast.rollout.engines.paged import Engine
from hiper_fast.rollout.play import Draw, Rollouts

LARGE = 120e9  # bytes of a GPU that keeps all layers' activations
GIB = 2**30
MORE = 3  # times as long as that of the update's episodes the whole rollout may take


class Size(NamedTuple):
    """One rollout, and what is timed beside it."""

    model: str  # empty: a tiny one
    episodes: int
    turns: int
    prompts: tuple[int, int]  # tokens, from and to
    response: int
    batches: tuple[int, ...]  # of decoding steps
    learned: int  # episodes of the update that is timed


SIZES = {
    "full": Size("Qwen/Qwen2.5-1.5B", 128, 50, (700, 780), 38, (1, 8, 32, 64, 128), 16),
    "tiny": Size("", 4, 2, (20, 30), 5, (1, 3), 2),
}


class Endless:
    """An environment that only a turn limit ends."""

    INFO = {"admissible_commands": ["look"], "won": False, "task": "go on", "task_type": "endless"}

    def reset(self, *, seed=None, options=None):
        return "A room.", dict(self.INFO)

    def step(self, command):
        return "A room.", 0.0, False, False, dict(self.INFO)


class EndlessFamily(Family):
    environment = Endless


def run(name: str, device: str, left: Callable[[], float]) -> dict[str, object]:
    """Prompt tokens a second, milliseconds and launches of a step; seconds and memory of a step's stages.

    `left`: seconds that it may take still; without enough for the whole rollout that is left out.
    """
    size, memory = SIZES[name], Memory(device)
    config = configure(size, device)
    agent = build_agent(size, config)
    engine = Engine(agent, config)
    result: dict[str, object] = {"size": size._asdict()}
    with contextlib.closing(engine):
        engine.wake()
        result["prompt_tokens_per_second"] = attempt(lambda: measure_prompts(engine, size))
        result["decoding"] = attempt(lambda: measure_steps(engine, size))
        engine.sleep()
        family = EndlessFamily(EnvConfig())
        rollouts = Rollouts(agent, engine, (), family, Prompts(size), config)
        optimizers = build_optimizers(agent, config)  # whose states are there from the update on
        result["update"] = attempt(lambda: time_update(rollouts, optimizers, size, config, memory))
        needed = MORE * result["update"].get("rollout_seconds", 0)
        if left() < needed:
            result["skipped"] = f"the rollout: it may take {needed:.0f} s"
            return result
        with memory.of(plan.ROLLOUT):
            result["rollout"] = attempt(lambda: time_rollout(rollouts, size.episodes, device)[1])
    result["step_seconds"] = attempt(lambda: add_stages(result))
    result["gib"] = attempt(lambda: compare_memory(config, memory))
    return result


class Memory:
    """The most bytes that torch held of a GPU in each stage."""

    def __init__(self, device: str):
        self.counts, self.peaks = device == "cuda", {}

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        if self.counts:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.counts:
            self.peaks[stage] = torch.cuda.max_memory_allocated()


def compare_memory(config: Config, memory: Memory) -> dict[str, dict[str, float]]:
    """Of each stage what the plan says, without CUDA's own, and what torch held."""
    config.plan.tflops = config.plan.gb_per_s = 1.0  # no rates are needed
    planned = plan.sum_stages(plan.list_parts(config, plan.find_machine(config)))
    return {
        stage: {"planned": size / GIB}
        | ({"measured": memory.peaks[stage] / GIB} if stage in memory.peaks else {})
        for stage, size in planned.items()
    }


def add_stages(result: dict) -> float:
    """Of a whole step: the rollout, and scoring and update of all episodes at the rate of those that were timed."""
    learned = result["update"]
    part = sum(learned[name] for name in ("scoring_seconds", "credit_seconds", "update_seconds"))
    return result["rollout"]["seconds"] + part / learned["share"]


def configure(size: Size, device: str) -> Config:
    given = {"model.device": device, "env.max_turns": size.turns}
    given |= {
        "agent.max_response_tokens": size.response,
        "agent.max_prompt_tokens": size.prompts[1],
    }
    if device == "cpu":
        return resolve(["alfworld"], given | {"model.dtype": "float32"})
    memory = torch.cuda.get_device_properties(0).total_memory
    given |= {"plan.gpu": "here"}
    return resolve(["alfworld", f"qwen2.5-1.5b-1x{141 if memory > LARGE else 80}gb"], given)


def build_agent(size: Size, config: Config) -> Agent:
    """Policy, critic and reference of random weights; all ids may be drawn, and none ends a response."""
    tokenizer = load_tokenizer(families.find("household").tokenizer)
    architecture = build_architecture(size, len(tokenizer))
    with torch.device(config.model.device):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.model.dtype)
        )
    if config.model.gradient_checkpointing:
        recompute(model.base_model)
    agent = Agent(model.eval(), tokenizer, config.model, tiny=False)
    agent.head, agent.stop_ids = Head(architecture.vocab_size), ()
    agent.freeze_reference()
    agent.add_critic()
    return agent


def build_architecture(size: Size, vocabulary: int) -> PretrainedConfig:
    if size.model:
        return find_architecture(size.model, None, True)
    return Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary,
    )  # fmt: skip


class Prompts:
    """In a prompter's place: random ids, of the same seed in the same order."""

    def __init__(self, size: Size):
        self.rng, self.lengths = random.Random(0), size.prompts

    def draw(self) -> list[int]:
        return [self.rng.randrange(100) for _ in range(self.rng.randint(*self.lengths))]

    def __call__(self, states: list) -> list[tuple[list[int], bool]]:
        return [(self.draw(), False) for _ in states]


def enter(engine: Engine, prompts: list[list[int]], first: int = 0) -> list[Entering]:
    """Gives each prompt a row and blocks, as the engine would."""
    limit, entering = engine.limit, []
    for row, ids in enumerate(prompts, first):
        blocks, held = engine.blocks.take(ids, len(ids) + limit)
        entering.append(Entering(row, ids, held, blocks, uniforms(row, limit), 1.0))
    return entering


def measure_prompts(engine: Engine, size: Size) -> float:
    """Tokens a second of a pass over as many prompts as one takes, a token of each drawn."""
    prompts = Prompts(size)
    count = max(1, min(engine.budget // size.prompts[1], size.episodes))
    entering = enter(engine, [prompts.draw() for _ in range(count)])
    spent = milliseconds(
        lambda: engine.decoder.read(entering, []), engine.agent.device.type, repeats=5
    )
    for one in entering:
        engine.blocks.give_back(one.blocks)
    return 1e3 * sum(len(one.ids) - one.held for one in entering) / spent


def measure_steps(engine: Engine, size: Size) -> dict[str, dict]:
    """Milliseconds of a step of each batch, and launches of the largest one's, with CUDA graphs and without."""
    decoder, kind = engine.decoder, engine.agent.device.type
    prompts = Prompts(size)
    for row in range(max(size.batches)):
        decoder.read(enter(engine, [prompts.draw()], row), [])
    found, largest = {}, range(size.batches[-1])
    for name, used in {"graphs": decoder.graphs, "operations": None}.items():
        if name == "graphs" and used is None:
            continue
        decoder.graphs = used
        times = {n: milliseconds(lambda n=n: decoder.go_on(range(n)), kind) for n in size.batches}
        launched = attempt(lambda: count_launches(lambda: decoder.go_on(largest), kind))
        found[name] = {"milliseconds": times, "launches": launched}
    return found


def time_rollout(rollouts: Rollouts, episodes: int, device: str) -> tuple[object, dict]:
    """The trajectories, and seconds and tokens of a rollout."""
    tasks = [{"seed": seed} for seed in range(episodes)]
    t, seconds = timed(lambda: rollouts.play(Draw(tasks, 1.0, 0)), device)
    counts = {"turns": t.turns, "prompt_tokens": t.prompt_ids.numel()}
    return t, {"seconds": seconds, **counts, "response_tokens": t.response_ids.numel()}


def time_update(
    rollouts: Rollouts, optimizers: dict, size: Size, config: Config, memory: Memory
) -> dict[str, object]:
    """Scoring, credit and update of a part of the step's episodes, as training does them: the second of two."""
    t, played = time_rollout(rollouts, size.learned, config.model.device)
    shape(t, config)
    learn(
        rollouts.agent, optimizers, t, config, memory
    )  # compiles, and makes the optimisers' states
    found = {"share": size.learned / size.episodes, "rollout_seconds": played["seconds"]}
    return found | learn(rollouts.agent, optimizers, t, config, memory)


def learn(agent: Agent, optimizers: dict, t, config: Config, memory: Memory) -> dict[str, object]:
    device, estimate = config.model.device, estimators.find(config.advantage.estimator)
    with memory.of(plan.SCORING):
        scores, scoring = timed(lambda: score(agent, t, config), device)
    targets, crediting = timed(lambda: give_credit(t, scores, estimate, config.advantage), device)
    generator = torch.Generator().manual_seed(0)
    with memory.of(plan.UPDATE):
        losses, learning = timed(
            lambda: update(agent, optimizers, t, targets, config, generator), device
        )
    return {
        "scoring_seconds": scoring,
        "credit_seconds": crediting,
        "update_seconds": learning,
        "skipped_steps": losses["optim/skipped_steps"],
    }


def timed(call: Callable[[], object], device: str) -> tuple[object, float]:
    """The result, and seconds until the device has made it."""
    began = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
