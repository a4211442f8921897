"""What runs where, and how fast: every op on every device here, at the size of one update.

python -m hiper_fast.bench
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import hiper_fast
from hiper_fast import ops
from hiper_fast.agent import varlen


class Size(NamedTuple):
    """How much one call of each op gets."""

    trajectories: int
    turns: int  # per trajectory
    tokens: int  # per response
    rows: int  # of the linear ops: hidden states of `width`, over `vocabulary` tokens
    width: int
    vocabulary: int


SIZES = {"full": Size(128, 50, 290, 1024, 128, 4096), "tiny": Size(4, 5, 40, 16, 8, 50)}
OF_TOKENS = "find_roles", "scatter_advantages", "normalize_and_scatter", "ppo_loss"
OF_ROWS = "linear_logprobs", "linear_ppo", "sample", "rms_norm", "swiglu", "rope"
HEADS, HEAD_SIZE, BLOCK = 2, 64, 16  # of the attention, whose sequences are one to a trajectory
USUAL_HEAD = 128  # of a pretrained model
COUNTED = dict.fromkeys(OF_TOKENS, "tokens") | dict.fromkeys(OF_ROWS, "rows")  # the others: turns
COUNTED["paged_attention"] = "trajectories"
FRAGMENTS = [b"<", b"switch", b">", b"KEEP", b"SW", b"ITCH", b"</", b"><", b"subgoal", b"action"]
LETTERS = b"abcdefghijklmnopqrstuvwxyz "
GAMMA, NEAR = 0.99, 0.2  # the discount; how far log-probs are from older ones
ROUNDED_UP = 999.5  # from here on three digits are 1,000
BUDGET, FEWEST, MOST = 0.3, 3, 100  # seconds of measuring a call, and calls in them


def choose_size() -> str:
    """$HIPER_FAST_BENCH=tiny makes every benchmark small enough to be a test."""
    return "tiny" if os.environ.get("HIPER_FAST_BENCH") == "tiny" else "full"


def make_responses(size: Size) -> tuple[torch.Tensor, torch.Tensor, ops.TokenPieces]:
    """Token ids, cu_tokens, pieces: cut as by a byte-level vocabulary of Qwen's size."""
    rng = np.random.default_rng(0)
    ends = rng.integers(1, 9, size=151_000).cumsum()
    text = rng.choice(np.frombuffer(LETTERS, dtype=np.uint8), size=ends[-1]).tobytes()
    words = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    turns = size.trajectories * size.turns
    responses = [make_response(rng, len(words), size.tokens) for _ in range(turns)]
    cu_tokens = torch.arange(turns + 1, dtype=torch.int32) * size.tokens  # [turns + 1]
    pieces = ops.TokenPieces.from_bytes([*FRAGMENTS, *words])
    return torch.from_numpy(np.concatenate(responses)), cu_tokens, pieces


def make_response(rng: np.random.Generator, words: int, length: int) -> np.ndarray:
    """Token ids: thoughts, the switch block, a subgoal of four words and an action of five."""
    decision = "KEEP" if rng.random() < 0.7 else "SW ITCH"
    head = spell(f"< switch > {decision} </ switch >< subgoal >")
    middle, tail = spell("</ subgoal >< action >"), spell("</ action >")
    ids = rng.integers(len(FRAGMENTS), len(FRAGMENTS) + words, size=length)
    thoughts = ids[: length - len(head + middle + tail) - 9]
    return np.concatenate([thoughts, head, ids[-9:-5], middle, ids[-5:], tail])


def spell(fragments: str) -> list[int]:
    return [FRAGMENTS.index(fragment.encode()) for fragment in fragments.split()]


def make_inputs(size: Size, device: str = "cpu") -> SimpleNamespace:
    """The arguments of every op for one such update, random but for the responses' format."""
    generator = torch.Generator().manual_seed(0)
    turns, rows = size.trajectories * size.turns, size.rows
    tokens = turns * size.tokens

    def draw(*shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device).requires_grad_(grad)

    ids, cu_tokens, pieces = make_responses(size)
    x = SimpleNamespace(token_ids=ids.to(device), cu_tokens=cu_tokens.to(device), pieces=pieces)
    x.roles, x.switch, _, _ = ops.find_roles(x.token_ids, x.cu_tokens, pieces)
    x.rewards, x.values_low, x.values_high, x.values_switch = (draw(turns) for _ in range(4))
    x.terminated = (torch.rand(size.trajectories, generator=generator) < 0.5).to(device)
    x.cu_turns = (torch.arange(size.trajectories + 1, dtype=torch.int32) * size.turns).to(device)
    x.levels = run_hae(ops, x)
    x.advantages, x.loss_mask = ops.scatter_advantages(x.levels, x.roles, x.cu_tokens)
    x.logprobs, x.entropy = draw(tokens, grad=True), draw(tokens, grad=True)
    x.old_logprobs = x.logprobs.detach() + draw(tokens, scale=NEAR)
    x.ref_logprobs = x.logprobs.detach() + draw(tokens, scale=NEAR)
    x.values = draw(turns, grad=True)
    scale = size.width**-0.25
    x.hidden = draw(rows, size.width, scale=scale, grad=True)
    x.weight = draw(size.vocabulary, size.width, scale=scale, grad=True)
    x.targets = torch.randint(0, size.vocabulary, (rows,), generator=generator).to(device)
    chosen = ops.linear_logprobs(x.hidden, x.weight, x.targets).detach()  # [rows]
    x.row_old, x.row_ref = (chosen + draw(rows, scale=NEAR) for _ in range(2))
    x.row_advantages = draw(rows)
    x.logits = draw(rows, size.vocabulary, scale=2.0)
    x.uniform = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
    x.temperature = (torch.arange(rows) % 3 / 2).to(device)  # a third is greedy
    per_sequence = math.ceil(size.tokens / BLOCK)
    pool = size.trajectories * per_sequence
    x.asked = draw(size.trajectories, HEADS, HEAD_SIZE)
    x.key_pool, x.value_pool = (draw(pool, BLOCK, HEADS, HEAD_SIZE) for _ in range(2))
    order = torch.randperm(pool, generator=generator, dtype=torch.int32)
    x.blocks = order.view(size.trajectories, per_sequence).to(device)
    x.cu_query = torch.arange(size.trajectories + 1, dtype=torch.int32).to(device)
    x.lengths = torch.full((size.trajectories,), size.tokens, dtype=torch.int32).to(device)
    x.scale = draw(size.width, grad=True)  # of the norm
    x.gate, x.up = (draw(rows, 2 * size.width, grad=True) for _ in range(2))
    shape = rows, 2 * (size.width // 2)
    x.query, x.key = (draw(1, heads, *shape, grad=True) for heads in (2, 1))
    x.cos, x.sin = draw(1, *shape), draw(1, *shape)
    return x


def run_hae(which: ModuleType, x: SimpleNamespace) -> ops.HAE:
    return which.hae(
        x.rewards, x.values_low, x.values_high, x.switch, x.terminated, x.cu_turns,
        values_switch=x.values_switch, gamma=GAMMA, lambda_turn=0.9, lambda_segment=0.95,
    )  # fmt: skip


def make_calls(x: SimpleNamespace) -> dict[str, Callable[[ModuleType], object]]:
    """Op -> a call of it in `ops` or `ops.reference`, also backward where it has gradients."""
    turns = x.rewards, x.values_low, x.terminated, x.cu_turns
    paged = x.asked, x.key_pool, x.value_pool, x.blocks, x.cu_query, x.lengths
    responses, linear = (x.levels, x.roles, x.cu_tokens), (x.hidden, x.weight, x.targets)

    def run_linear_logprobs(which):
        logprobs, entropy = which.linear_logprobs(*linear, entropy=True)
        return torch.autograd.grad(logprobs.mean() + 0.001 * entropy.mean(), (x.hidden, x.weight))

    def run_ppo_loss(which):
        data = x.logprobs, x.old_logprobs, x.advantages, x.loss_mask
        result = which.ppo_loss(*data, ref_logprobs=x.ref_logprobs, entropy=x.entropy)
        return add_gradients(result, x.logprobs, x.entropy)

    def run_value_loss(which):
        result = which.value_loss(x.values, x.values_low, x.levels.returns_low, x.levels.boundary)
        return add_gradients(result, x.values)

    def run_linear_ppo(which):
        result = which.linear_ppo(*linear, x.row_old, x.row_advantages, ref_logprobs=x.row_ref)
        return add_gradients(result, x.hidden, x.weight)

    def run_rms_norm(which):
        return pull_back([which.rms_norm(x.hidden, x.scale)], x.hidden, x.scale)

    def run_rope(which):
        return pull_back(which.rope(x.query, x.key, x.cos, x.sin), x.query, x.key)

    def run_swiglu(which):
        return pull_back([which.swiglu(x.gate, x.up)], x.gate, x.up)

    return {
        "hae": lambda which: run_hae(which, x),
        "gae": lambda which: which.gae(*turns, gamma=GAMMA, lambda_=0.9),
        "normalize": lambda which: which.normalize(x.rewards, x.switch),
        "find_roles": lambda which: which.find_roles(x.token_ids, x.cu_tokens, x.pieces),
        "scatter_advantages": lambda which: which.scatter_advantages(*responses),
        "normalize_and_scatter": lambda which: which.normalize_and_scatter(*responses)[:2],
        "linear_logprobs": run_linear_logprobs,
        "ppo_loss": run_ppo_loss,
        "value_loss": run_value_loss,
        "linear_ppo": run_linear_ppo,
        "paged_attention": lambda which: which.paged_attention(*paged),
        "sample": lambda which: which.sample(x.logits, x.uniform, x.temperature),
        "rms_norm": run_rms_norm,
        "rope": run_rope,
        "swiglu": run_swiglu,
    }


def add_gradients(result, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(loss, its gradients); an op gives its loss with metrics, the reference gives it alone."""
    loss = result[0] if isinstance(result, tuple) else result
    return loss, *torch.autograd.grad(loss, inputs)


def pull_back(results: Sequence[torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The results, and the inputs' gradients where the results' are the results themselves."""
    values = [result.detach() for result in results]
    return *results, *torch.autograd.grad(results, inputs, values)


def measure(call: Callable[[], object], device: str, budget: float = BUDGET) -> float:
    """Median seconds of a call, after one to warm up; none but that if it outlasts the budget."""

    def time_call() -> float:
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = time_call()
    if first > budget:
        return first
    count = min(MOST, max(FEWEST, math.ceil(budget / first)))
    return statistics.median(time_call() for _ in range(count))


def describe_machine() -> dict[str, str]:
    """What a figure depends on beside the code."""
    names = (line for line in read_lines("/proc/cpuinfo") if line.startswith("model name"))
    name = next(names, f":{platform.processor() or platform.machine()}")
    threads = f"{os.cpu_count()} cores; torch threads: {torch.get_num_threads()}"
    facts = {"machine": f"{name.split(':', 1)[1].strip()}, {threads}"}
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts | {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hiper_fast": hiper_fast.__version__,
    }


def describe_attention() -> str:
    """What updates of a half-precision model with heads of usual size attend by here, and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(varlen.choose_kernel(device, torch.bfloat16, USUAL_HEAD))


def read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def format_duration(seconds: float) -> str:
    """Three digits: 4.21 µs, 65.3 ms, 1.2 s."""
    for unit, per_second in (("µs", 1e6), ("ms", 1e3)):
        if seconds * per_second < ROUNDED_UP:
            return f"{seconds * per_second:.3g} {unit}"
    return f"{seconds:.3g} s"


def format_rate(count: float) -> str:
    """Three digits: 812, 64.2k, 1.9M, 30G."""
    for unit, size in (("", 1), ("k", 1e3), ("M", 1e6)):
        if count / size < ROUNDED_UP:
            return f"{count / size:.3g}{unit}"
    return f"{count / 1e9:.3g}G"


def time_ops(size: Size, show: Callable[[str], None]) -> list[dict]:
    """Times every op on every device, showing the table's lines as they come; a dict per line."""
    counts = {"turns": size.trajectories * size.turns, "rows": size.rows}
    counts["trajectories"] = size.trajectories
    counts["tokens"] = counts["turns"] * size.tokens
    show(f"{'op':<23}{'device':<8}{'runs as':<15}{'time':>9}   throughput")
    implementations = ops.implementations()
    results, reasons = [], {}
    for device in next(iter(implementations.values())):
        for op, call in make_calls(make_inputs(size, device)).items():
            chosen = implementations[op][device]
            note = f" [{reasons.setdefault(chosen.why, len(reasons) + 1)}]" if chosen.why else ""
            seconds = measure(lambda call=call: call(ops), device)
            unit = COUNTED.get(op, "turns")
            per_second = counts[unit] / seconds
            results.append(
                {"op": op, "device": device, "implementation": str(chosen), "why": chosen.why,
                 "seconds": seconds, f"{unit}_per_second": per_second}
            )  # fmt: skip
            duration, rate = format_duration(seconds), format_rate(per_second)
            show(f"{op:<23}{device:<8}{chosen + note:<15}{duration:>9}   {rate} {unit}/s")
    show("")
    for why, number in reasons.items():
        show(f"[{number}] {why}")
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default=choose_size(),
        help="full: 6,400 turns of 290 tokens; tiny: a test of the command itself [tiny if "
        "$HIPER_FAST_BENCH is, else full]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    file, size = arguments.json, SIZES[arguments.size]
    if file and not file.resolve().parent.is_dir():
        parser.error(f"--json {file}: there is no folder {file.parent}; create it first")
    turns = f"{size.trajectories * size.turns:,} turns of {size.tokens} tokens"
    linear = (
        f"{size.rows:,} rows of width {size.width}, {size.vocabulary:,} tokens in the vocabulary"
    )
    print(
        f"Medians of one call each, losses with their gradients. {turns};\nlinear ops: {linear}.\n"
    )
    results = time_ops(size, lambda line: print(line, flush=True))
    facts = describe_machine() | {"attention": describe_attention()}
    print("".join(f"\n{name:<12}{fact}" for name, fact in facts.items()))
    if file:
        content = {**facts, "size": size._asdict(), "ops": results}
        try:
            file.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            print(f"{parser.prog}: --json {file}: {reason}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
