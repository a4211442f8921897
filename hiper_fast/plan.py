"""What a run will need, told before it starts: memory, time, and the change that makes it fit.

    python -m hiper_fast.train --config alfworld --config qwen2.5-1.5b-1x80gb --plan

Memory is counted from the model's configuration: weights, gradients and optimiser states exactly,
activations by running the model's own code without data. Times are counts over rates; what is
assumed is named where it is shown.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hiper_fast import estimators
from hiper_fast.agent.agent import HEADS
from hiper_fast.agent.footprint import (
    Footprint,
    count_pass,
    count_sampling,
    count_state,
    measure_model,
)
from hiper_fast.config import Config, PlanConfig
from hiper_fast.envs.family import families
from hiper_fast.learn.loss import is_fused
from hiper_fast.ops._head import CHUNK_BYTES
from hiper_fast.options import ConfigError, flatten
from hiper_fast.rollout.engines import paged

GIB = 2**30
KEPT, ROLLOUT, SCORING, UPDATE = "kept throughout", "in rollout", "in scoring", "in update"
HOST = "on the CPU"

# `plan.gpu`: bytes, FLOP/s in bfloat16, bytes/s. The H200's rates were measured; the others' are of
# data sheets.
GPUS = {
    "rtx4090": (23.5 * GIB, 165e12, 1008e9),
    "a100": (79 * GIB, 312e12, 2039e9),
    "h100": (79 * GIB, 989e12, 3350e9),
    "h200": (140 * GIB, 790e12, 4300e9),
}

# Assumptions.
RESERVE_BYTES, RESERVE_SHARE = 1 * GIB, 0.05  # CUDA's own memory, and what fragmentation loses
LAUNCH = 10e-6  # seconds to launch an operation on a GPU, where none was measured
KERNEL = 2.5e-6  # seconds of an operation in a CUDA graph, at least
HOST_RATE, LINK_RATE = 20e9, 25e9  # bytes/s of AdamW in the CPU's memory, and between it and a GPU
SENT = 1.5  # over offloaded gradients: these go there, and narrower weights come back
RANK = 32  # of the LoRA that is proposed

FLOAT32 = 4  # bytes
BLOCK, TABLE, LEAST_8BIT = (
    256,
    256,
    4096,
)  # values a scale, of a table, of a tensor with 8-bit moments

# Bytes of the fused head, a chunk of logits and of their gradients: on a GPU as its Triton kernels
# bound it.
SCRATCH = CHUNK_BYTES | {"cuda": 480_000_000}

YEAR, MOST_YEARS = 365.25 * 24 * 3600, 1  # seconds; a run that takes longer is refused

CALLS, LAUNCHES = 5, 1000  # of which the fastest is taken; operations that one of them launches


def show(config: Config) -> None:
    """Prints the plan; ConfigError after its memory, before any times, if the run cannot fit or would never end."""
    machine = find_machine(config)
    print("\n".join(format_memory(config, machine)))
    check(config, machine)
    check_time(config, machine)
    print("\n".join(["", *format_times(config, machine)]))


def check_here(config: Config) -> None:
    """ConfigError if the run cannot fit into the GPUs at hand, whatever it was planned for."""
    config = copy.deepcopy(config)
    config.plan = PlanConfig(tflops=1.0, gb_per_s=1.0)  # no rates are needed
    if find_kind(config) == "cuda" and torch.cuda.is_available():
        check(config, find_machine(config))


# The machine.


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs that share a run, or the CPU."""

    name: str
    kind: str  # cuda or cpu
    gpus: int
    memory: float  # bytes of one
    host: float  # bytes of the CPU's memory; 0: not known
    flops: float  # a second, of a large product
    bandwidth: float  # bytes a second, read and written
    launch: float  # seconds to launch an operation
    source: str  # of the rates

    @property
    def usable(self) -> float:
        if self.kind != "cuda":
            return self.memory
        return self.memory * (1 - RESERVE_SHARE) - RESERVE_BYTES


def find_machine(config: Config) -> Machine:
    """What `plan.gpu` names, or what is here, with measured rates; `plan`'s own go over both."""
    plan, kind, launch = config.plan, find_kind(config), LAUNCH
    if plan.gpu != "here":
        name, host, (memory, flops, bandwidth) = plan.gpu, 0.0, GPUS[plan.gpu]
        source = "measured once" if plan.gpu == "h200" else "its data sheet's"
    else:
        name = torch.cuda.get_device_name() if kind == "cuda" else "this CPU"
        memory, host = read_memory(kind)
        flops, bandwidth, source = 0.0, 0.0, "as given"
        if not (plan.tflops and plan.gb_per_s):
            flops, bandwidth, launch = measure_rates(kind)
            source = "measured now"
    return Machine(
        name=name,
        kind=kind,
        gpus=count_processes(config),
        memory=plan.memory_gb * GIB or memory,
        host=plan.host_memory_gb * GIB or host,
        flops=plan.tflops * 1e12 or flops,
        bandwidth=plan.gb_per_s * 1e9 or bandwidth,
        launch=launch,
        source=source,
    )


def find_kind(config: Config) -> str:
    return "cuda" if config.plan.gpu != "here" else config.model.device.split(":")[0]


def read_memory(kind: str) -> tuple[float, float]:
    """Bytes of the device's memory and of the CPU's."""
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if kind == "cpu":
        return host, host
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), host


@functools.cache
def measure_rates(kind: str) -> tuple[float, float, float]:
    """FLOP/s of a large product, bytes/s of a copy, seconds to launch an operation."""
    size, dtype, values = 768, torch.float32, 2**24
    if kind == "cuda":
        size, dtype, values = 8192, torch.bfloat16, 2**28
    a, b = (torch.zeros(size, size, dtype=dtype, device=kind) for _ in range(2))
    source, target, one = (torch.zeros(n, device=kind) for n in (values, values, 1))
    product = time_fastest(lambda: torch.mm(a, b), kind)
    copied = time_fastest(lambda: target.copy_(source), kind)
    launches = time_fastest(lambda: [one.add_(1) for _ in range(LAUNCHES)], kind)
    return 2 * size**3 / product, 2 * source.nbytes / copied, launches / LAUNCHES


def time_fastest(call: Callable[[], object], kind: str) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    times = []
    for _ in range(1 + CALLS):
        began = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# What the configuration says.


def count_processes(config: Config) -> int:
    return config.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))


def find_footprint(config: Config) -> Footprint:
    tokenizer = families.find(config.env.name).tokenizer
    return measure_model(config.model.path, tokenizer, config.model.local_files_only)


def find_dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.model.dtype)


def count_tokens(config: Config) -> tuple[int, int, int]:
    """Turns of an update, mean tokens of a prompt and of a response."""
    return (
        config.plan.turns or config.train.episodes * config.env.max_turns,
        config.plan.prompt_tokens or config.agent.max_prompt_tokens,
        config.plan.response_tokens or config.agent.max_response_tokens,
    )


def find_shared(config: Config) -> tuple[float, float]:
    """The shares of tokens that scoring and updates see and need not read."""
    plan = config.plan
    return (plan.shared_scoring, plan.shared_update) if config.train.share_prefixes else (0.0, 0.0)


def count_steps(config: Config) -> int:
    """Optimiser steps of an update."""
    train, (turns, _, _) = config.train, count_tokens(config)
    sequences = train.episodes if config.agent.style == "transcript" else turns
    return (
        math.ceil(sequences / train.minibatch_size) if train.minibatch_size else train.minibatches
    )


def count_own(config: Config, episodes: int) -> int:
    """Of `episodes` those that one process plays."""
    return math.ceil(episodes / count_processes(config))


def count_context(config: Config) -> float:
    """Tokens that the cache holds before a response, on average."""
    turns, prompt, response = count_tokens(config)
    if config.agent.style != "transcript":
        return prompt
    conversation = turns / config.train.episodes * (prompt + response)
    return min(max(prompt, conversation / 2), config.agent.max_prompt_tokens)


# The built-in engine, in each process.


@dataclass(frozen=True, slots=True)
class Pool:
    """The blocks of keys and values that the engine takes, and who shares them."""

    rows: int  # responses under way at once
    each: int  # blocks of the longest prompt and response
    blocks: int
    size: int  # tokens of a block

    @property
    def tokens(self) -> int:
        return self.blocks * self.size


def measure_pool(config: Config, machine: Machine) -> Pool:
    """Room for every row at its longest, or what the engine may take; at least for one."""
    agent, rollout = config.agent, config.rollout
    size = paged.BLOCK[machine.kind]
    each = math.ceil((agent.max_prompt_tokens + agent.max_response_tokens) / size)
    free = machine.usable
    if machine.kind == "cuda":
        weights = [*list_trained(config), *list_weights(config)]
        free = max(0.0, free - sum_bytes(weights, KEPT, ROLLOUT))
    given = getattr(rollout, "cache_gb", 0.0)  # the built-in engine's own
    room = given * GIB or paged.SHARE * free
    affordable = int(room // (size * count_token(config)))
    return Pool(rollout.slots, each, max(each, min(rollout.slots * each, affordable)), size)


def count_token(config: Config) -> int:
    """Bytes of a token's keys and values."""
    return find_footprint(config).kv * find_dtype(config).itemsize


def count_together(config: Config, machine: Machine, episodes: int) -> int:
    """Of `episodes` those whose responses are under way together in one process."""
    pool = measure_pool(config, machine)
    each = count_context(config) + config.agent.max_response_tokens
    return max(1, min(count_own(config, episodes), pool.rows, int(pool.tokens // each)))


def count_most(config: Config) -> int:
    """Responses that may be under way together, in a rollout or an evaluation."""
    episodes = max(config.train.episodes, config.eval.episodes)
    return min(count_own(config, episodes), config.rollout.slots)


# Memory.


@dataclass(frozen=True, slots=True)
class Part:
    """What one thing takes of a GPU's memory, in bytes."""

    name: str
    size: float
    when: str
    note: str = ""


def has_critic(config: Config) -> bool:
    return estimators.needs_values(estimators.find(config.advantage.estimator))


def has_own_critic(config: Config) -> bool:
    """A critic with a trunk of its own."""
    return has_critic(config) and config.model.critic == "separate"


def list_parts(config: Config, machine: Machine) -> list[Part]:
    parts = list_trained(config), list_weights(config), list_rollout(config, machine)
    return [*itertools.chain(*parts), *list_passes(config)]


def list_trained(config: Config) -> Iterator[Part]:
    """Weights, masters, moments and gradients of policy and critic, and the reference."""
    footprint, model, processes = find_footprint(config), config.model, count_processes(config)
    whole = find_dtype(config).itemsize * footprint.total / processes
    shards = f", sharded over {processes}" if processes > 1 else ""
    frozen, policy, trunk = 0.0, footprint.tensors, footprint.trunk
    how = f"float32{shards}" if shards else model.dtype
    if model.lora_rank:
        frozen, how = whole, f"with LoRA of rank {model.lora_rank}"
        policy = trunk = footprint.adapters(model.lora_rank, model.lora_targets)
    yield from list_states(config, "policy", policy, 0, frozen, how)
    trunk = trunk if has_own_critic(config) else ()
    heads = (HEADS * footprint.width + HEADS) * has_critic(config)
    yield from list_states(config, "critic", trunk, heads, 0.0, how if trunk else "heads alone")
    if config.train.kl_coef and not frozen:  # with LoRA it is the policy without its adapters
        yield Part("reference model", whole, KEPT, f"{model.dtype}{shards}")


def list_states(
    config: Config, name: str, tensors: tuple[int, ...], heads: int, frozen: float, how: str
) -> Iterator[Part]:
    """What one process has for training: tensors of so many values, float32 heads; `frozen` bytes.

    Shards of several processes are float32 and their own masters.
    """
    processes, train = count_processes(config), config.train
    narrow = find_dtype(config).itemsize if processes == 1 else FLOAT32
    wide = FLOAT32 if train.master_weights else narrow
    count = sum(tensors)
    weights = (narrow * count + FLOAT32 * heads) / processes
    gradients = (wide * count + FLOAT32 * heads) / processes
    moments = sum(count_moment(values, wide, train.optimizer) for values in tensors)
    moments = 2 * (moments + FLOAT32 * heads) / processes
    masters, offloaded = wide * count if wide != narrow else 0.0, 0.0
    if train.optimizer == "offload" and find_kind(config) == "cuda":
        masters, moments, offloaded = 0.0, 0.0, 2 * gradients + moments
    yield Part(f"{name}: weights", weights + frozen, KEPT, how)
    yield Part(f"{name}: master weights", masters, KEPT, "float32")
    yield Part(f"{name}: optimiser states", moments, KEPT, train.optimizer)
    yield Part(f"{name}: gradients", gradients, UPDATE)
    yield Part(f"{name}: masters and states", offloaded, HOST, "offloaded")


def count_moment(count: int, wide: int, optimizer: str) -> float:
    """Bytes of one moment: `wide` a value; or 8 bits, a float32 scale a block, and a table."""
    if optimizer == "adamw8bit" and count >= LEAST_8BIT and count % BLOCK == 0:
        return count + count / BLOCK * FLOAT32 + TABLE * FLOAT32
    return wide * count


def list_weights(config: Config) -> Iterator[Part]:
    """What a rollout reads beside what trains."""
    whole = find_dtype(config).itemsize * find_footprint(config).total
    if count_processes(config) > 1:
        yield Part("whole policy", whole, ROLLOUT, config.model.dtype)
    if config.rollout.ahead:
        yield Part("policy, an update older", whole, KEPT, config.model.dtype)


def list_rollout(config: Config, machine: Machine) -> Iterator[Part]:
    """What the engine takes when it wakes, and its largest passes."""
    footprint, dtype, agent = find_footprint(config), find_dtype(config), config.agent
    when = KEPT if config.rollout.ahead else ROLLOUT  # then it plays while an update learns
    pool, most = measure_pool(config, machine), count_most(config)
    cache = (pool.blocks + 1) * pool.size * count_token(config)  # one block is nobody's
    note = f"{pool.tokens:,} tokens; a response needs {pool.each * pool.size:,} at most"
    yield Part("KV cache", cache, when, note)
    state = count_state(pool.rows, pool.each, agent.max_response_tokens)
    yield Part("responses under way", state, when, f"{pool.rows} at most")
    prompts = max(agent.batch_tokens, agent.max_prompt_tokens)
    largest = count_sampling(footprint, dtype, most, prompts).peak
    yield Part("a pass", largest, when, f"{prompts:,} prompt tokens, {most} responses")
    if machine.kind == "cuda":  # all share the largest one's memory, which no pass gets
        held = count_sampling(footprint, dtype, most).peak
        yield Part("CUDA graphs", held, when)


def list_passes(config: Config) -> Iterator[Part]:
    """What a microbatch needs: activations, the head's logits, layers out of their shards."""
    footprint, dtype, model = find_footprint(config), find_dtype(config), config.model
    tokens, recomputed = config.train.microbatch_tokens, model.gradient_checkpointing
    scored = count_pass(footprint, tokens, dtype, train=False).peak
    trained = count_pass(footprint, tokens, dtype, train=True, checkpointing=recomputed).peak
    scratch = SCRATCH[find_kind(config)]
    gradient = (
        0 if model.lora_rank else FLOAT32 * footprint.head
    )  # of the head, or of the embedding
    how = "layers recomputed" if recomputed else "all layers kept"
    yield Part("activations", scored, SCORING, f"{tokens:,} tokens")
    yield Part("head: logits", scratch, SCORING)
    yield Part("activations", max(trained, gradient), UPDATE, f"{tokens:,} tokens, {how}")
    yield Part("head: logits, its gradient", scratch + gradient, UPDATE)
    if count_processes(config) > 1:
        trunks = 1 + has_own_critic(config)
        whole = (2 * footprint.layer + trunks * footprint.outside) * dtype.itemsize
        summed = FLOAT32 * max(footprint.layer, footprint.outside)  # gradients on their way
        yield Part("layers out of their shards", whole, SCORING)
        yield Part("layers out of their shards", whole + summed, UPDATE)


def sum_stages(parts: list[Part]) -> dict[str, float]:
    """Bytes of the GPU in use at most, by stage."""
    kept = sum_bytes(parts, KEPT)
    return {when: kept + sum_bytes(parts, when) for when in (ROLLOUT, SCORING, UPDATE)}


def sum_bytes(parts: list[Part], *when: str) -> float:
    return sum(part.size for part in parts if part.when in when)


def find_peak(parts: list[Part]) -> tuple[str, float]:
    """The stage that needs most of the GPU, and its bytes."""
    return max(sum_stages(parts).items(), key=lambda item: item[1])


# What would make it fit.


def check(config: Config, machine: Machine) -> None:
    """ConfigError if the run cannot fit, naming the smallest change that would make it."""
    shortage = find_shortage(config, machine)
    if shortage:
        changes = find_smallest_change(config, machine)
        mend = "no change of options would make it: use a smaller model"
        if changes:
            mend = "it would with " + " ".join(describe_change(*change) for change in changes)
        raise ConfigError(f"{config.model.path} does not fit: {shortage}; {mend}")


def find_shortage(config: Config, machine: Machine) -> str | None:
    """What does not fit, in words; None if all does."""
    if machine.gpus > 1 and config.train.optimizer != "adamw":
        return f"train.optimizer {config.train.optimizer} works in one process only"
    parts = list_parts(config, machine)
    (when, peak), host = find_peak(parts), sum_bytes(parts, HOST)
    if peak > machine.usable:
        has = f"{machine.name} has {machine.usable / GIB:.1f} to give"
        return f"{peak / GIB:.1f} GiB are needed {when}, and {has}"
    if machine.host and host > machine.host:
        has = f"there are {machine.host / GIB:.1f}"
        return f"offloading needs {host / GIB:.1f} GiB of CPU memory, and {has}"
    return None


Change = tuple[str, object]  # an option and its value


def find_smallest_change(config: Config, machine: Machine) -> tuple[Change, ...]:
    """The first single change that makes the run fit, else the first pair, and so on; or ()."""
    for changes in combine_changes(list(list_changes(config, machine))):
        if not find_shortage(*apply_changes(config, machine, changes)):
            return changes
    return ()


def combine_changes(changes: list[list[Change]]) -> Iterator[tuple[Change, ...]]:
    """One change of each option, then every two of different options, and so on."""
    for count in range(1, len(changes) + 1):
        for options in itertools.combinations(changes, count):
            yield from itertools.product(*options)


def list_changes(config: Config, machine: Machine) -> Iterator[list[Change]]:
    """Each option's other values, if any; from what costs least to what costs most."""
    old = flatten(config)
    prompt, response = config.agent.max_prompt_tokens, config.agent.max_response_tokens
    values = {
        "rollout.cache_gb": [0.0] if old.get("rollout.cache_gb") else [],
        "model.gradient_checkpointing": [True],
        "train.microbatch_tokens": halve(old["train.microbatch_tokens"], prompt + response),
        "model.dtype": ["bfloat16"],
        "train.optimizer": ["adamw", "adamw8bit", "offload"],
        "model.lora_rank": [] if config.model.path == "tiny" or config.model.lora_rank else [RANK],
        "model.critic": ["shared"],
        "agent.batch_tokens": halve(old["agent.batch_tokens"], prompt),
        "plan.gpus": [n for n in (2, 4, 8, 16) if n > machine.gpus and machine.kind == "cuda"],
    }
    for name, others in values.items():
        yield [(name, value) for value in others if value != old[name]]


def halve(value: int, least: int) -> list[int]:
    halves = (value >> power for power in range(1, value.bit_length()))
    return [half for half in halves if half >= least]


def apply_changes(
    config: Config, machine: Machine, changes: tuple[Change, ...]
) -> tuple[Config, Machine]:
    config = copy.deepcopy(config)
    for name, value in changes:
        section, key = name.split(".")
        setattr(getattr(config, section), key, value)
    return config, replace(machine, gpus=count_processes(config))


def describe_change(name: str, value: object) -> str:
    if name == "plan.gpus":
        return f"{value} GPUs (torchrun --nproc-per-node {value})"
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


# Time.


def estimate_seconds(config: Config, machine: Machine) -> dict[str, float]:
    """Expected seconds of each stage of one update; of evaluation, an update's share."""
    footprint, train, model = find_footprint(config), config.train, config.model
    turns, prompt, response = count_tokens(config)
    turns, length = turns / machine.gpus, prompt + response
    flops = machine.flops * config.plan.utilisation
    forward = 2 * count_products(footprint, length) * turns * length / flops  # of every token
    scored, trained = (forward * (1 - shared) for shared in find_shared(config))
    head = 2 * footprint.head * turns * response / flops
    # Forward, and backward to inputs and weights: no gradients of frozen weights.
    passes = (2 if model.lora_rank else 3) + model.gradient_checkpointing
    separate = has_own_critic(config)
    references = bool(train.kl_coef) + (train.old_logprobs == "recomputed")
    policy_step, critic_step = (
        count_steps(config) * estimate_step(config, machine, name) for name in ("policy", "critic")
    )
    prompts, responses = estimate_rollout(config, machine, train.episodes)
    evaluation = sum(estimate_rollout(config, machine, config.eval.episodes)) / config.eval.every
    return {
        "rollout: prompts": prompts,
        "rollout: responses": responses,
        "scoring": scored * (separate + references) + head * references,
        "policy update": trained * passes + head * (3 if is_fused(train) else 4) + policy_step,
        "critic update": trained * passes * separate + critic_step,
        "evaluation, a share": evaluation,
    }


def check_time(config: Config, machine: Machine) -> None:
    """ConfigError for a run that nobody would wait for."""
    updates = config.train.updates
    years = updates * sum(estimate_seconds(config, machine).values()) / YEAR
    if years > MOST_YEARS:
        raise ConfigError(
            f"{config.model.path}: {updates} updates (train.updates) would take {years:,.1f} years on {machine.name}; "
            "plan for a GPU (--plan.gpu h100), a smaller model or fewer updates"
        )


def count_products(footprint: Footprint, length: float) -> float:
    """Of a token, on average over a sequence: one with each weight, in attention two with half of the tokens."""
    return footprint.computed + footprint.layers * footprint.heads * length


def estimate_rollout(config: Config, machine: Machine, episodes: int) -> tuple[float, float]:
    """Of reading prompts, and of sampling; none waits for another, so the longest chain of responses counts."""
    footprint, dtype = find_footprint(config), find_dtype(config)
    turns, prompt, response = count_tokens(config)
    own, together = count_own(config, episodes), count_together(config, machine, episodes)
    mean, looks = turns / config.train.episodes, paged.STEPS[machine.kind]
    each = response + (looks - 1) / 2  # steps of a response: it waits to be looked at
    # When the last free place is taken, an episode to the turn limit is still to come.
    steps = ((own / together - 1) * mean + config.env.max_turns) * each
    width = own * mean * each / steps
    flops = machine.flops * config.plan.utilisation
    one = count_sampling(footprint, dtype, 1)
    launches = one.operations * (machine.launch + (looks - 1) * KERNEL) / looks
    weights = footprint.computed + footprint.head
    context = count_context(config)
    cache = footprint.kv * (context + response / 2)
    read = (weights + cache * width) * dtype.itemsize + one.moved * width
    step = max(read / machine.bandwidth, 2 * weights * width / flops, launches)
    products = count_products(footprint, 2 * context - prompt)
    unread = own * mean * prompt * (1 - config.plan.shared_scoring)
    return 2 * products * unread / flops, steps * step


def estimate_step(config: Config, machine: Machine, name: str) -> float:
    """Of an optimiser step: all that is kept is read and written, there and back if offloaded."""
    own = (part for part in list_trained(config) if part.name.startswith(name))
    sizes = {part.name.removeprefix(f"{name}: "): part.size for part in own}
    offloaded = sizes.pop("masters and states")
    sent = sizes["gradients"] * SENT / LINK_RATE if offloaded else 0.0
    return 2 * (sum(sizes.values()) / machine.bandwidth + offloaded / HOST_RATE) + sent


# As a person reads it.


def format_memory(config: Config, machine: Machine) -> list[str]:
    weights, parts = find_footprint(config).total, list_parts(config, machine)
    gpus = f"{machine.gpus} x " if machine.gpus > 1 else ""
    lines = [
        f"{config.model.path}, {weights / 1e6:,.1f} M weights, on {gpus}{machine.name}",
        "",
        format_row("memory, GiB" + " of each" * (machine.gpus > 1)),
    ]
    for when in (KEPT, ROLLOUT, SCORING, UPDATE, HOST):
        some = [part for part in parts if part.when == when and part.size]
        lines += [format_row(when, sum_bytes(some, when) / GIB)] if some else []
        lines += [format_row(f"  {part.name}", part.size / GIB, part.note) for part in some]
    when, peak = find_peak(parts)
    reserve = ""
    if machine.kind == "cuda":
        assumed = f"{RESERVE_BYTES / GIB:.0f} GiB + {RESERVE_SHARE:.0%}"
        reserve = f"of {machine.memory / GIB:.1f}; assumed: CUDA and fragmentation take {assumed}"
    usable = format_row("there is", machine.usable / GIB, reserve)
    return [*lines, format_row("at most", peak / GIB, when), usable]


def format_times(config: Config, machine: Machine) -> list[str]:
    turns, prompt, response = count_tokens(config)
    tokens = f"{turns:,} turns, prompts of {prompt:,}, responses of {response} tokens"
    stages, updates = estimate_seconds(config, machine), config.train.updates
    total = sum(stages.values())
    rates = f"{machine.flops / 1e12:,.3g} TFLOP/s and {machine.bandwidth / 1e9:,.0f} GB/s"
    launch = f"{machine.launch * 1e6:.1f} µs to launch an operation"
    if machine.kind == "cuda":
        launch += f", {KERNEL * 1e6:.1f} µs in a CUDA graph"
    return [
        format_row("time of an update, s", None, tokens),
        *(format_row(f"  {name}", seconds) for name, seconds in stages.items()),
        format_row("together", total, f"{updates} updates: {updates * total / 3600:.1f} h"),
        "",
        f"From {rates} ({machine.source}).",
        f"Assumed: {config.plan.utilisation:.0%} of those TFLOP/s, {launch};",
        f"one episode of a batch to its turn limit, {describe_shared(config)}.",
        "Not counted: environments, communication, checkpoints.",
    ]


def describe_shared(config: Config) -> str:
    prompts, (scored, trained) = config.plan.shared_scoring, find_shared(config)
    if not (prompts or trained):
        return "no turn that begins like another's"
    return f"of prompts {prompts:.0%}, of tokens scored {scored:.0%} and trained {trained:.0%} read before"


def format_row(name: str, value: float | None = None, note: str = "") -> str:
    return f"{name:<34}{'' if value is None else f'{value:.2f}':>9}  {note}".rstrip()
