"""What runs where, and how fast: every op on every device of this machine, at the size of one update.

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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import hiper_fast
from hiper_fast import ops


class Size(NamedTuple):
    """How much one call of each op gets."""

    trajectories: int
    turns: int  # per trajectory
    tokens: int  # per response
    rows: int  # of the linear ops: hidden states of `width`, over `vocabulary` tokens
    width: int
    vocabulary: int


SIZES = {"full": Size(128, 50, 290, 1024, 128, 4096), "tiny": Size(4, 5, 40, 16, 8, 50)}
COUNTED = dict.fromkeys(("find_roles", "scatter_advantages", "normalize_and_scatter", "ppo_loss"), "tokens")
COUNTED |= {"linear_logprobs": "rows", "linear_ppo": "rows"}  # the others: turns


def default_size() -> str:
    """$HIPER_FAST_BENCH=tiny makes every benchmark small enough to be a test."""
    return "tiny" if os.environ.get("HIPER_FAST_BENCH") == "tiny" else "full"


def responses(size: Size) -> tuple[torch.Tensor, torch.Tensor, ops.TokenPieces]:
    """Token ids, cu_tokens and pieces: responses cut as a byte-level vocabulary of Qwen's size cuts them."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    fragments = [b"<", b"switch", b">", b"KEEP", b"SW", b"ITCH", b"</", b"><", b"subgoal", b"action"]
    ends = rng.integers(1, 9, size=151_000).cumsum()
    text = rng.choice(letters, size=ends[-1]).tobytes()
    pieces = fragments + [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    id_of = {piece: i for i, piece in enumerate(fragments)}

    def response() -> np.ndarray:
        word = [b"KEEP"] if rng.random() < 0.7 else [b"SW", b"ITCH"]
        head = [b"<", b"switch", b">", *word, b"</", b"switch", b"><", b"subgoal", b">"]
        middle, tail = [b"</", b"subgoal", b"><", b"action", b">"], [b"</", b"action", b">"]
        ids = [id_of[x] for x in head], [id_of[x] for x in middle], [id_of[x] for x in tail]
        words = rng.integers(len(fragments), len(pieces), size=size.tokens)
        plain = size.tokens - sum(map(len, ids)) - 9
        return np.concatenate([words[:plain], ids[0], words[-9:-5], ids[1], words[-5:], ids[2]])

    turns = size.trajectories * size.turns
    ids = torch.from_numpy(np.concatenate([response() for _ in range(turns)]))
    cu_tokens = torch.arange(turns + 1, dtype=torch.int32) * size.tokens
    return ids, cu_tokens, ops.TokenPieces.from_bytes(pieces)


def step_inputs(size: Size, device: str = "cpu") -> SimpleNamespace:
    """The arguments of every op for one update of that size, random but for the responses' format."""
    g = torch.Generator().manual_seed(0)
    turns = size.trajectories * size.turns
    tokens = turns * size.tokens

    def normal(*shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=g)).to(device).requires_grad_(grad)

    ids, cu_tokens, pieces = responses(size)
    x = SimpleNamespace(token_ids=ids.to(device), cu_tokens=cu_tokens.to(device), pieces=pieces)
    x.roles, x.switch, _, _ = ops.find_roles(x.token_ids, x.cu_tokens, pieces)
    x.rewards, x.values_low, x.values_high, x.values_switch = (normal(turns) for _ in range(4))
    x.terminated = (torch.rand(size.trajectories, generator=g) < 0.5).to(device)
    x.cu_turns = (torch.arange(size.trajectories + 1, dtype=torch.int32) * size.turns).to(device)
    x.levels = levels(ops, x)
    x.advantages, x.loss_mask = ops.scatter_advantages(x.levels, x.roles, x.cu_tokens)
    x.logprobs, x.entropy = normal(tokens, grad=True), normal(tokens, grad=True)
    x.old_logprobs, x.ref_logprobs = (x.logprobs.detach() + normal(tokens, scale=0.2) for _ in range(2))
    x.values = normal(turns, grad=True)
    x.hidden, x.weight = (
        normal(n, size.width, scale=size.width**-0.25, grad=True) for n in (size.rows, size.vocabulary)
    )
    x.targets = torch.randint(0, size.vocabulary, (size.rows,), generator=g).to(device)
    chosen = ops.linear_logprobs(x.hidden, x.weight, x.targets).detach()
    x.row_old, x.row_ref = (chosen + normal(size.rows, scale=0.2) for _ in range(2))
    x.row_advantages = normal(size.rows)
    return x


def levels(which: ModuleType, x: SimpleNamespace) -> ops.HAE:
    return which.hae(
        x.rewards, x.values_low, x.values_high, x.switch, x.terminated, x.cu_turns,
        values_switch=x.values_switch, gamma=0.99, lambda_turn=0.9, lambda_segment=0.95,
    )  # fmt: skip


def calls(x: SimpleNamespace) -> dict[str, Callable[[ModuleType], object]]:
    """Op -> a call of it in `ops` or `ops.reference`; what has gradients runs forward and backward."""

    def linear_logprobs(which):
        logprobs, entropy = which.linear_logprobs(x.hidden, x.weight, x.targets, entropy=True)
        return torch.autograd.grad(logprobs.mean() + 0.001 * entropy.mean(), (x.hidden, x.weight))

    def ppo_loss(which):
        result = which.ppo_loss(
            x.logprobs, x.old_logprobs, x.advantages, x.loss_mask, ref_logprobs=x.ref_logprobs, entropy=x.entropy
        )
        return with_gradients(result, x.logprobs, x.entropy)

    def value_loss(which):
        result = which.value_loss(x.values, x.values_low, x.levels.returns_low, x.levels.boundary)
        return with_gradients(result, x.values)

    def linear_ppo(which):
        result = which.linear_ppo(x.hidden, x.weight, x.targets, x.row_old, x.row_advantages, ref_logprobs=x.row_ref)
        return with_gradients(result, x.hidden, x.weight)

    return {
        "hae": lambda which: levels(which, x),
        "gae": lambda which: which.gae(x.rewards, x.values_low, x.terminated, x.cu_turns, gamma=0.99, lambda_=0.9),
        "normalize": lambda which: which.normalize(x.rewards, x.switch),
        "find_roles": lambda which: which.find_roles(x.token_ids, x.cu_tokens, x.pieces),
        "scatter_advantages": lambda which: which.scatter_advantages(x.levels, x.roles, x.cu_tokens),
        "normalize_and_scatter": lambda which: which.normalize_and_scatter(x.levels, x.roles, x.cu_tokens)[:2],
        "linear_logprobs": linear_logprobs,
        "ppo_loss": ppo_loss,
        "value_loss": value_loss,
        "linear_ppo": linear_ppo,
    }


def with_gradients(result, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(loss, its gradients); an op gives its loss with metrics, the reference gives it alone."""
    loss = result[0] if isinstance(result, tuple) else result
    return loss, *torch.autograd.grad(loss, inputs)


def measure(call: Callable[[], object], device: str, budget: float = 0.3) -> float:
    """Median seconds of a call, after one to warm up; a first call that outlasts the budget is the measurement."""

    def timed() -> float:
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = timed()
    if first > budget:
        return first
    count = min(100, max(3, math.ceil(budget / first)))
    return statistics.median(timed() for _ in range(count))


def machine() -> dict[str, str]:
    """What a figure depends on beside the code."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    facts = {"machine": f"{cpu}, {os.cpu_count()} cores; torch threads: {torch.get_num_threads()}"}
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts | {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hiper_fast": hiper_fast.__version__,
    }


def read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def duration(seconds: float) -> str:
    """Three digits: 4.21 µs, 65.3 ms, 1.2 s."""
    scale, unit = next(((s, u) for s, u in ((1e6, "µs"), (1e3, "ms")) if seconds * s < 999.5), (1, "s"))
    return f"{seconds * scale:.3g} {unit}"


def rate(count: float) -> str:
    """Three digits: 812, 64.2k, 1.9M, 30G."""
    scale, unit = next(((s, u) for s, u in ((1, ""), (1e3, "k"), (1e6, "M")) if count / s < 999.5), (1e9, "G"))
    return f"{count / scale:.3g}{unit}"


def run(size: Size, show: Callable[[str], None]) -> list[dict]:
    """Times every op on every device, showing the table's lines as they come; a dict per line."""
    counts = {"turns": size.trajectories * size.turns, "rows": size.rows}
    counts["tokens"] = counts["turns"] * size.tokens
    show(f"{'op':<23}{'device':<8}{'runs as':<15}{'time':>9}   throughput")
    implementations = ops.implementations()
    results, reasons = [], {}
    for device in next(iter(implementations.values())):
        for op, call in calls(step_inputs(size, device)).items():
            chosen = implementations[op][device]
            note = f" [{reasons.setdefault(chosen.why, len(reasons) + 1)}]" if chosen.why else ""
            seconds = measure(lambda call=call: call(ops), device)
            unit = COUNTED.get(op, "turns")
            per_second = counts[unit] / seconds
            results.append(
                {"op": op, "device": device, "implementation": str(chosen), "why": chosen.why, "seconds": seconds,
                 f"{unit}_per_second": per_second}
            )  # fmt: skip
            show(f"{op:<23}{device:<8}{chosen + note:<15}{duration(seconds):>9}   {rate(per_second)} {unit}/s")
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
        default=default_size(),
        help="full: 6,400 turns of 290 tokens; tiny: a test of the command itself [tiny if $HIPER_FAST_BENCH is, "
        "else full]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}; create it first")
    size = SIZES[arguments.size]
    print(
        f"Medians of one call each, losses with their gradients. {size.trajectories * size.turns:,} turns of "
        f"{size.tokens} tokens;\nlinear ops: {size.rows:,} rows of width {size.width}, {size.vocabulary:,} tokens "
        "in the vocabulary.\n"
    )
    results = run(size, lambda line: print(line, flush=True))
    facts = machine()
    print("".join(f"\n{name:<12}{fact}" for name, fact in facts.items()))
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps({**facts, "size": size._asdict(), "ops": results}, indent=2) + "\n")
        except OSError as error:
            print(f"{parser.prog}: --json {arguments.json}: cannot be written ({error.strerror})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
