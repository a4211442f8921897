"""What a run will need, told before it starts: memory by part, time by stage, and the change that makes it fit.

    python -m hiper_fast.train --config alfworld --config qwen2.5-1.5b-1x80gb --plan

Memory is counted from the model's configuration: weights, gradients and optimiser states exactly, activations by
running the model's own code without data. Times are counts over rates; what is assumed is named where it is shown.
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

from hiper_fast.config import Config, ConfigError, PlanConfig, environment, flatten, prompt_style
from hiper_fast.families import FAMILIES
from hiper_fast.footprint import Footprint, footprint, run
from hiper_fast.ops._head import CHUNK_BYTES
from hiper_fast.policy import device_name

GIB = 2**30
KEPT, ROLLOUT, SCORING, UPDATE, HOST = "kept throughout", "in rollout", "in scoring", "in update", "on the CPU"

# `plan.gpu`: GiB, TFLOP/s in bfloat16, GB/s. The H200's rates were measured; the others' are of data sheets.
GPUS = {"rtx4090": (23.5, 165, 1008), "a100": (79, 312, 2039), "h100": (79, 989, 3350), "h200": (140, 790, 4300)}

# Assumptions.
RESERVE_BYTES, RESERVE_SHARE = 1 * GIB, 0.05  # CUDA's own memory, and what fragmentation loses
LONGEST = 2  # a batch's longest response over the mean
LAUNCH = 10e-6  # seconds to launch an operation on a GPU, where none was measured
HOST_RATE, LINK_RATE = 20e9, 25e9  # bytes/s of AdamW in the CPU's memory, and between it and a GPU

# Bytes of the fused head, a chunk of logits and of their gradients: on a GPU as its Triton kernels bound it.
SCRATCH = CHUNK_BYTES | {"cuda": 480_000_000}


def show(config: Config) -> None:
    """Prints the plan; ConfigError after it if the run cannot fit."""
    place = machine(config)
    print(report(config, place))
    check(config, place)


def check_here(config: Config) -> None:
    """ConfigError if the run cannot fit into the GPUs at hand, whatever it was planned for."""
    config = copy.deepcopy(config)
    config.plan = PlanConfig(tflops=1.0, gb_per_s=1.0)  # no rates are needed
    if device_kind(config) == "cuda" and torch.cuda.is_available():
        check(config, machine(config))


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
        return self.memory * (1 - RESERVE_SHARE) - RESERVE_BYTES if self.kind == "cuda" else self.memory


def machine(config: Config) -> Machine:
    """What `plan.gpu` names, or the GPU or CPU at hand with its rates measured; `plan`'s figures go over both."""
    p, kind = config.plan, device_kind(config)
    if p.gpu == "here":
        name = torch.cuda.get_device_name() if kind == "cuda" else "this CPU"
        memory, host = device_memory(kind)
        given = p.tflops and p.gb_per_s
        flops, bandwidth, launch = (0.0, 0.0, LAUNCH) if given else measured(kind)
        source = "as given" if given else "measured now"
    else:
        memory, flops, bandwidth = (x * unit for x, unit in zip(GPUS[p.gpu], (GIB, 1e12, 1e9), strict=True))
        name, host, launch = p.gpu, 0.0, LAUNCH
        source = "measured once" if p.gpu == "h200" else "its data sheet's"
    return Machine(
        name, kind, processes(config), p.memory_gb * GIB or memory, p.host_memory_gb * GIB or host,
        p.tflops * 1e12 or flops, p.gb_per_s * 1e9 or bandwidth, launch, source,
    )  # fmt: skip


def device_kind(config: Config) -> str:
    return "cuda" if config.plan.gpu != "here" else device_name(config.model).split(":")[0]


def device_memory(kind: str) -> tuple[float, float]:
    """Bytes of the device's memory and of the CPU's."""
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if kind == "cpu":
        return host, host
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), host


@functools.cache
def measured(kind: str) -> tuple[float, float, float]:
    """FLOP/s of a large product, bytes/s of a copy, seconds to launch an operation; takes about a second."""
    size, dtype, values = (8192, torch.bfloat16, 2**28) if kind == "cuda" else (768, torch.float32, 2**24)
    a, b = (torch.zeros(size, size, dtype=dtype, device=kind) for _ in range(2))
    source, target, one = (torch.zeros(n, device=kind) for n in (values, values, 1))
    product = fastest(lambda: torch.mm(a, b), kind)
    copied = fastest(lambda: target.copy_(source), kind)
    launched = fastest(lambda: [one.add_(1) for _ in range(1000)], kind) / 1000
    return 2 * size**3 / product, 2 * source.nbytes / copied, launched


def fastest(call: Callable[[], object], kind: str) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# What the configuration says.


def processes(config: Config) -> int:
    return config.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))


def model_of(config: Config) -> Footprint:
    tokenizer = FAMILIES[environment(config)].tokenizer
    return footprint(config.model.path, tokenizer, config.model.local_files_only)


def dtype_of(config: Config) -> torch.dtype:
    return getattr(torch, config.model.dtype)


def tokens_of(config: Config) -> tuple[int, int, int]:
    """Turns of an update, mean tokens of a prompt and of a response."""
    p, a = config.plan, config.agent
    return (
        p.turns or config.train.episodes * config.env.max_turns,
        p.prompt_tokens or a.max_prompt_tokens,
        p.response_tokens or a.max_response_tokens,
    )


def in_flight(config: Config) -> int:
    """Episodes that generate together in one process."""
    return min(own_episodes(config), max(1, config.agent.batch_tokens // tokens_of(config)[1]))


def own_episodes(config: Config) -> int:
    return math.ceil(config.train.episodes / processes(config))


def cached(config: Config) -> tuple[int, int]:
    """(episodes whose keys and values are held at once, tokens of each at most)."""
    response = config.agent.max_response_tokens
    if prompt_style(config) == "transcript":  # all of them, from turn to turn
        return own_episodes(config), config.agent.max_prompt_tokens + response
    return in_flight(config), tokens_of(config)[1] + response


# Memory.


@dataclass(frozen=True, slots=True)
class Part:
    """What one thing takes of a GPU's memory, in bytes."""

    name: str
    size: float
    when: str
    note: str = ""


def memory(config: Config) -> list[Part]:
    return [*trained(config), *for_rollout(config), *for_passes(config)]


def trained(config: Config) -> Iterator[Part]:
    """Weights, masters, moments and gradients of policy and critic, and the reference."""
    f, c, n = model_of(config), config.model, processes(config)
    bytes = dtype_of(config).itemsize
    adapters = f.adapters(c.lora_rank, c.lora_targets)
    frozen = bytes * f.total / n if c.lora_rank else 0.0
    how = f"with LoRA of rank {c.lora_rank}" if frozen else f"float32, sharded over {n}" if n > 1 else c.dtype
    policy = states(config, adapters if frozen else f.tensors)
    trunk = () if c.critic == "shared" else adapters if frozen else f.trunk
    critic = states(config, trunk, heads=3 * f.width + 3)
    for name, part, base in (("policy", policy, frozen), ("critic", critic, 0.0)):
        yield Part(
            f"{name}: weights", part["weights"] + base, KEPT, how if name == "policy" or trunk else "heads alone"
        )
        yield Part(f"{name}: master weights", part["masters"], KEPT, "float32")
        yield Part(f"{name}: optimiser states", part["moments"], KEPT, config.train.optimizer)
        yield Part(f"{name}: gradients", part["gradients"], UPDATE)
        yield Part(f"{name}: masters and states", part["host"], HOST, "offloaded")
    if config.train.kl_coef and not frozen:  # with LoRA it is the policy without its adapters
        yield Part("reference model", bytes * f.total / n, KEPT, c.dtype if n == 1 else f"{c.dtype}, sharded over {n}")


def states(config: Config, tensors: tuple[int, ...], heads: int = 0) -> dict[str, float]:
    """Bytes in one process for training the model's weights, in tensors of so many values, and float32 heads.

    Shards of several processes are float32 and their own masters.
    """
    n, c = processes(config), config.train
    narrow = dtype_of(config).itemsize if n == 1 else 4
    wide = 4 if c.master_weights else narrow
    count = sum(tensors)
    gradients = (wide * count + 4 * heads) / n
    moments = 2 * (sum(moment(k, wide, c.optimizer) for k in tensors) + 4 * heads) / n
    part = {"weights": (narrow * count + 4 * heads) / n, "gradients": gradients, "host": 0.0}
    if c.optimizer == "offload" and device_kind(config) == "cuda":
        return part | {"masters": 0.0, "moments": 0.0, "host": 2 * gradients + moments}
    return part | {"masters": wide * count if wide != narrow else 0.0, "moments": moments}


def moment(count: int, wide: int, optimizer: str) -> float:
    """Bytes of one moment: `wide` a value; or 8 bits, with a float32 scale for each 256 values, and a table."""
    if optimizer == "adamw8bit" and count >= 4096 and count % 256 == 0:
        return count + count / 256 * 4 + 256 * 4
    return wide * count


def for_rollout(config: Config) -> Iterator[Part]:
    """The largest KV cache, every response at its limit, and the larger of a prompt's pass and of sampling."""
    f, bytes = model_of(config), dtype_of(config).itemsize
    kept_episodes, tokens = cached(config)
    cache = f.kv * bytes * kept_episodes * tokens
    episodes = in_flight(config)
    prefill = run(f, episodes * tokens_of(config)[1], dtype_of(config), train=False).peak
    sampling = episodes * f.vocabulary * (bytes + 20)  # logits, float32 log-probs and two float64 copies
    longer = cache / f.layers / 2  # a layer's keys or values again, one token longer
    yield Part("KV cache", cache, ROLLOUT, f"{kept_episodes} episodes x {tokens:,} tokens")
    yield Part("prompts' pass or sampling", max(prefill, sampling + longer), ROLLOUT)
    if processes(config) > 1:
        yield Part("whole policy", bytes * f.total, ROLLOUT, config.model.dtype)


def for_passes(config: Config) -> Iterator[Part]:
    """What passes over a microbatch need beside weights: activations, the head's logits, layers out of their shards."""
    f, c, dtype, tokens = model_of(config), config.model, dtype_of(config), config.train.microbatch_tokens
    scratch, trunks = SCRATCH[device_kind(config)], 1 + (c.critic == "separate")
    peak = run(f, tokens, dtype, train=True, checkpointing=c.gradient_checkpointing).peak
    how = "layers recomputed" if c.gradient_checkpointing else "all layers kept"
    yield Part("activations", run(f, tokens, dtype, train=False).peak, SCORING, f"{tokens:,} tokens")
    yield Part("head: logits", scratch, SCORING)
    gradient = 0 if c.lora_rank else 4 * f.head
    yield Part("activations", max(peak, gradient), UPDATE, f"{tokens:,} tokens, {how}")  # or the embedding's gradient
    yield Part("head: logits, its gradient", scratch + gradient, UPDATE)
    if processes(config) > 1:
        layers, outside = 2 * f.layer * dtype.itemsize, f.outside * dtype.itemsize
        summed = 4 * max(f.layer, f.outside)  # gradients on their way
        yield Part("layers out of their shards", layers + trunks * outside, SCORING)
        yield Part("layers out of their shards", layers + trunks * outside + summed, UPDATE)


def totals(parts: list[Part]) -> dict[str, float]:
    """Bytes of the GPU in use at most, by stage."""
    kept = sum(p.size for p in parts if p.when == KEPT)
    return {when: kept + sum(p.size for p in parts if p.when == when) for when in (ROLLOUT, SCORING, UPDATE)}


def shortage(config: Config, machine: Machine) -> str | None:
    """What does not fit, in words; None if all does."""
    if machine.gpus > 1 and config.train.optimizer != "adamw":
        return f"train.optimizer {config.train.optimizer} works in one process only"
    parts = memory(config)
    when, peak = max(totals(parts).items(), key=lambda item: item[1])
    host = sum(p.size for p in parts if p.when == HOST)
    if peak > machine.usable:
        return f"{peak / GIB:.1f} GiB are needed {when}, and {machine.name} has {machine.usable / GIB:.1f} to give"
    if machine.host and host > machine.host:
        return f"offloading needs {host / GIB:.1f} GiB of CPU memory, and there are {machine.host / GIB:.1f}"
    return None


# What would make it fit.


def check(config: Config, machine: Machine) -> None:
    """ConfigError if the run cannot fit into the machine, naming the smallest change that would make it."""
    lack = shortage(config, machine)
    if lack:
        mend = " ".join(described(*change) for change in smallest_change(config, machine))
        raise ConfigError(
            f"{config.model.path} does not fit: {lack}; "
            + (f"it would with {mend}" if mend else "no change of options would make it: use a smaller model")
        )


Change = tuple[str, object]  # an option and its value


def smallest_change(config: Config, machine: Machine) -> tuple[Change, ...]:
    """The first single change that makes the run fit, else the first pair, and so on; empty if none does."""
    changes = possible_changes(config, machine)
    for count in range(1, len(changes) + 1):
        for options in itertools.combinations(changes, count):
            for chosen in itertools.product(*([(name, value) for value in changes[name]] for name in options)):
                if not shortage(*changed(config, machine, chosen)):
                    return chosen
    return ()


def possible_changes(config: Config, machine: Machine) -> dict[str, list]:
    """Option -> other values; from what costs least to what costs most."""
    flat = flatten(config)
    prompt, response = config.agent.max_prompt_tokens, config.agent.max_response_tokens

    def halves(name: str, least: int) -> list[int]:
        return [flat[name] >> i for i in range(1, flat[name].bit_length()) if flat[name] >> i >= least]

    changes = {
        "model.gradient_checkpointing": [True],
        "train.microbatch_tokens": halves("train.microbatch_tokens", prompt + response),
        "model.dtype": ["bfloat16"],
        "train.optimizer": ["adamw", "adamw8bit", "offload"],
        "model.lora_rank": [32] if config.model.path != "tiny" and not config.model.lora_rank else [],
        "model.critic": ["shared"],
        "agent.batch_tokens": halves("agent.batch_tokens", prompt),
        "plan.gpus": [n for n in (2, 4, 8, 16) if n > machine.gpus and machine.kind == "cuda"],
    }
    other = {name: [value for value in values if value != flat[name]] for name, values in changes.items()}
    return {name: values for name, values in other.items() if values}


def changed(config: Config, machine: Machine, changes: tuple[Change, ...]) -> tuple[Config, Machine]:
    config = copy.deepcopy(config)
    for name, value in changes:
        section, key = name.split(".")
        setattr(getattr(config, section), key, value)
    return config, replace(machine, gpus=processes(config))


def described(name: str, value: object) -> str:
    if name == "plan.gpus":
        return f"{value} GPUs (torchrun --nproc-per-node {value})"
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


# Time.


def seconds(config: Config, machine: Machine) -> dict[str, float]:
    """Expected seconds of each stage of one update; of evaluation, an update's share."""
    f, c, m = model_of(config), config.train, config.model
    turns, prompt, response = tokens_of(config)
    turns = turns / machine.gpus
    flops = machine.flops * config.plan.utilisation
    # Each weight takes a product and a sum a token; attention, over half of the sequence on average, twice that.
    forward = 2 * (f.computed + f.layers * f.heads * (prompt + response)) * turns * (prompt + response) / flops
    head = 2 * f.head * turns * response / flops
    passes = (2 if m.lora_rank else 3) + m.gradient_checkpointing  # no gradients of frozen weights
    separate, references = m.critic == "separate", bool(c.kl_coef) + (c.old_logprobs == "recomputed")
    steps = {name: c.minibatches * step_seconds(config, machine, name) for name in ("policy", "critic")}
    prefill, decode = rollout_seconds(config, machine)
    return {
        "rollout: prompts": prefill,
        "rollout: responses": decode,
        "scoring": forward * (separate + references) + head * references,
        "policy update": forward * passes + head * 3 + steps["policy"],
        "critic update": forward * passes * separate + steps["critic"],
        "evaluation, a share": (prefill + decode) * config.eval.episodes / c.episodes / config.eval.every,
    }


def rollout_seconds(config: Config, machine: Machine) -> tuple[float, float]:
    """Of reading prompts, and of sampling: each step of a group reads weights and cache, or waits for its launches."""
    f, bytes, together = model_of(config), dtype_of(config).itemsize, in_flight(config)
    turns, prompt, response = tokens_of(config)
    turns = turns / machine.gpus
    flops = machine.flops * config.plan.utilisation
    groups = config.env.max_turns * math.ceil(turns / config.env.max_turns / together)
    width = turns / groups
    launches = run(f, 1, dtype_of(config), train=False).operations * machine.launch
    read = (f.computed + f.head + f.kv * width * (prompt + response)) * bytes / machine.bandwidth
    step = max(read, 2 * (f.computed + f.head) * width / flops, launches)
    steps = groups * min(LONGEST * response, config.agent.max_response_tokens)
    return 2 * f.computed * turns * prompt / flops + groups * launches, steps * step


def step_seconds(config: Config, machine: Machine, name: str) -> float:
    """Of an optimiser step: all that is kept for it is read and written, on the CPU and over the link if offloaded."""
    parts = {p.name.removeprefix(f"{name}: "): p.size for p in trained(config) if p.name.startswith(name)}
    offloaded = parts.pop("masters and states")
    sent = parts["gradients"] * 1.5 / LINK_RATE if offloaded else 0.0  # gradients there, narrower weights back
    return 2 * (sum(parts.values()) / machine.bandwidth + offloaded / HOST_RATE) + sent


# As a person reads it.


def report(config: Config, machine: Machine) -> str:
    return "\n".join([*memory_table(config, machine), "", *time_table(config, machine)])


def memory_table(config: Config, machine: Machine) -> list[str]:
    f, parts = model_of(config), memory(config)
    gpus = f"{machine.gpus} x " if machine.gpus > 1 else ""
    lines = [
        f"{config.model.path}, {f.total / 1e6:,.1f} M weights, on {gpus}{machine.name}",
        "",
        row("memory, GiB" + " of each" * (machine.gpus > 1)),
    ]
    for when in (KEPT, ROLLOUT, SCORING, UPDATE, HOST):
        some = [p for p in parts if p.when == when and p.size]
        lines += [row(when, sum(p.size for p in some) / GIB)] if some else []
        lines += [row(f"  {p.name}", p.size / GIB, p.note) for p in some]
    when, peak = max(totals(parts).items(), key=lambda item: item[1])
    reserve = f"of {machine.memory / GIB:.1f}; assumed: CUDA and fragmentation take {RESERVE_BYTES / GIB:.0f} GiB + "
    reserve = reserve + f"{RESERVE_SHARE:.0%}" if machine.kind == "cuda" else ""
    return [*lines, row("at most", peak / GIB, when), row("there is", machine.usable / GIB, reserve)]


def time_table(config: Config, machine: Machine) -> list[str]:
    (turns, prompt, response), stages, c = tokens_of(config), seconds(config, machine), config.train
    total = sum(stages.values())
    rates = f"{machine.flops / 1e12:,.3g} TFLOP/s and {machine.bandwidth / 1e9:,.0f} GB/s ({machine.source})"
    launch = f"{machine.launch * 1e6:.1f} µs to launch an operation"
    return [
        row("time of an update, s", None, f"{turns:,} turns, prompts of {prompt:,}, responses of {response} tokens"),
        *(row(f"  {name}", value) for name, value in stages.items()),
        row("together", total, f"{c.updates} updates: {c.updates * total / 3600:.1f} h"),
        "",
        f"From {rates}.",
        f"Assumed: {config.plan.utilisation:.0%} of those TFLOP/s, {launch}, a batch's longest response",
        f"{LONGEST} times the mean. Not counted: environments, communication, checkpoints.",
    ]


def row(name: str, value: float | None = None, note: str = "") -> str:
    return f"{name:<34}{'' if value is None else f'{value:.2f}':>9}  {note}".rstrip()
