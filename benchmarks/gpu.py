"""All that needs a GPU, in under eight minutes: the kernels' tests, their times beside their peers', a rollout.

    pip install --no-build-isolation --no-deps -e . && python benchmarks/gpu.py

writes benchmarks/results/gpu-<name of the GPU>.json. Peers that are not installed (liger-kernel, cut-cross-entropy) are
left out with the reason. A figure comes only after its results agree with the reference's; times are medians in
milliseconds, of CUDA graph replays where a whole call fits in one. `--device cpu --size tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hiper_fast import bench, ops
from hiper_fast.ops._ppo import ppo_terms

sys.path.insert(0, str(Path(__file__).parent))  # for gpu_rollout.py
import gpu_rollout

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 450  # seconds after which no further part begins
ROLLOUT = 170  # of them are left for benchmarks/gpu_rollout.py


class Size(NamedTuple):
    """One HiPER step, and one microbatch of loss rows at a model's head."""

    trajectories: int
    turns: int  # of each
    tokens: int  # of each response
    rows: int
    width: int
    vocabulary: int


SIZES = {"full": Size(128, 50, 281, 16_384, 1536, 151_936), "tiny": Size(4, 5, 40, 16, 8, 50)}
TARGETS = {
    "hae + normalise + scatter": 0.015,
    "linear_ppo": 34.0,
}  # milliseconds, on an H200, at full size


def facts(device: str) -> dict[str, object]:
    """What a figure depends on beside the code, and which code it was."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    return bench.describe_machine() | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "commit": git("rev-parse", "HEAD")
        + (" and changes" if git("status", "--porcelain") else ""),
        "versions": {
            name: installed(name)
            for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy")
        },
    }


def correctness(timeout: float) -> dict[str, object]:
    """The kernels' and the ops' tests on this GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/gpu"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": 0, "ok": False, "output": f"not done after {timeout:.0f} s"}
    return {
        **counts(done.stdout),
        "ok": done.returncode == 0,
        "output": "" if done.returncode == 0 else done.stdout[-6000:],
    }


def counts(output: str) -> dict[str, int]:
    """pytest's closing line as numbers."""
    found = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)
    }
    return {word: found.get(word, 0) for word in ("passed", "failed", "skipped")}


def milliseconds(
    call: Callable[[], object], device: str, *, graph: bool = False, repeats: int = 20
) -> float:
    """Median of a call after warming up; `graph`: of replays of its CUDA graph, 20 calls to a graph."""
    if device == "cpu":
        return 1e3 * bench.measure(call, "cpu", budget=0.02)
    per_run = 1
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        per_run, captured = 20, torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(per_run):
                call()
        call = captured.replay
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / per_run)
    return statistics.median(times)


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a large copy and TFLOP/s of a large bfloat16 product: what the shares below are of."""
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(n * n * 8, device=device)
    target = torch.empty_like(source)
    return {
        "gigabytes_per_second": 2
        * source.nbytes
        / milliseconds(lambda: target.copy_(source), device)
        / 1e6,
        "teraflops": 2 * n**3 / milliseconds(lambda: a @ b, device) / 1e9,
    }


class Case(NamedTuple):
    """One figure: a call, a check that raises if its results are wrong, and the least work it must do."""

    name: str
    implementation: str
    call: Callable[[], object]
    check: Callable[[], None] = lambda: None
    bytes: int = 0
    flops: int = 0
    graph: bool = False
    compared_with: str = ""  # the name of our case that this is a peer of


def close(result, expected, tolerance: float = 1e-4) -> None:
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(
            x.cpu().double(), y.cpu().double(), rtol=tolerance, atol=tolerance
        )


def normalised_credit(x) -> tuple[Tensor, Tensor]:
    """(advantages, loss_mask) of the tokens, each level normalised over the turns that train it, by the public ops."""
    hae = bench.run_hae(ops, x)
    low, high, switch = (carried(x.roles, bit, x.cu_tokens) for bit in (1, 2, 4))
    hae = hae._replace(
        advantages_low=ops.normalize(hae.advantages_low, low),
        advantages_high=ops.normalize(hae.advantages_high, high & hae.boundary),
        advantages_switch=ops.normalize(hae.advantages_switch, switch),
    )
    return ops.scatter_advantages(hae, x.roles, x.cu_tokens)


def fused_credit(x) -> tuple[Tensor, Tensor]:
    """The same in three launches."""
    return ops.normalize_and_scatter(bench.run_hae(ops, x), x.roles, x.cu_tokens)[:2]


def step_cases(size: Size, device: str) -> list[Case]:
    """Roles, scans, scatter and the policy loss over one step's turns and tokens."""
    given = bench.Size(size.trajectories, size.turns, size.tokens, 8, 8, 50)
    x, cpu = bench.make_inputs(given, device), bench.make_inputs(given, "cpu")
    turns, tokens = len(x.rewards), len(x.token_ids)
    calls, calls_on_cpu = bench.make_calls(x), bench.make_calls(cpu)
    credit = fused_credit if device == "cuda" else normalised_credit

    def ours(name: str, least_bytes: int = 0, graph: bool = False) -> Case:
        def check():
            close(calls[name](ops), calls_on_cpu[name](ops))

        return Case(name, "ours", lambda: calls[name](ops), check, bytes=least_bytes, graph=graph)

    def torch_ppo():
        loss = ppo_terms(
            x.logprobs, x.old_logprobs, x.advantages, x.loss_mask, x.ref_logprobs, x.entropy,
            0.2, 0.2, 3.0, 0.01, 0.001, None, False,
        )[0]  # fmt: skip
        return loss, *torch.autograd.grad(loss, (x.logprobs, x.entropy))

    return [
        ours("find_roles"),
        ours("hae", 12 * 4 * turns, graph=True),
        ours("gae", 4 * 4 * turns, graph=True),
        ours("scatter_advantages", 6 * tokens, graph=True),
        Case(
            "hae + normalise + scatter", "ours", lambda: credit(x), lambda: close(credit(x), normalised_credit(cpu)),
            bytes=10 * 4 * turns + 6 * tokens, graph=True,
        ),
        ours("paged_attention", x.key_pool.nbytes + x.value_pool.nbytes, graph=True),
        ours("ppo_loss", 27 * tokens),
        Case("ppo_loss", "torch", torch_ppo, bytes=27 * tokens, compared_with="ppo_loss"),
    ]  # fmt: skip


def carried(roles: Tensor, bit: int, cu_tokens: Tensor) -> Tensor:
    """bool [turns]: the turn has a token of that role."""
    turns = len(cu_tokens) - 1
    turn = torch.arange(turns, device=roles.device).repeat_interleave(cu_tokens.diff())
    return torch.zeros(turns, dtype=torch.bool, device=roles.device).index_fill_(
        0, turn[(roles & bit) > 0], True
    )


class Rows:
    """A microbatch of loss rows at a model's head; `clipped`: that share of the rows is beyond the clip."""

    def __init__(self, size: Size, device: str, clipped: float = 0.0):
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=g, device=device)).to(dtype)

        self.n, self.h, self.v = size.rows, size.width, size.vocabulary
        self.hidden = normal(self.n, self.h).requires_grad_()
        self.weight = normal(self.v, self.h, scale=2 / self.h**0.5).requires_grad_()
        self.targets = torch.randint(0, self.v, (self.n,), generator=g, device=device)
        now = ops.linear_logprobs(self.hidden.detach(), self.weight.detach(), self.targets)
        noise = torch.randn(self.n, generator=g, device=device)
        self.ref = now + 0.1 * noise
        # Advantages above 0, so that a ratio of e is clipped and one of exp(±0.05) is not.
        self.advantages = 0.5 + torch.rand(self.n, generator=g, device=device)
        is_clipped = torch.arange(self.n, device=device) < clipped * self.n
        self.old = torch.where(
            is_clipped[torch.randperm(self.n, generator=g, device=device)],
            now - 1,
            now + 0.05 * noise,
        )
        self.leaves = (self.hidden, self.weight)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, kl_coef: float, entropy_coef: float
    ) -> Tensor:
        mask = torch.ones_like(self.targets, dtype=torch.bool)
        ref = self.ref if kl_coef else None
        return ppo_terms(
            logprobs,
            self.old,
            self.advantages,
            mask,
            ref,
            entropy,
            0.2,
            0.2,
            3.0,
            kl_coef,
            entropy_coef,
            None,
            False,
        )[0]


def linear_ppo_cases(rows: Rows, kl_coef: float, entropy_coef: float, name: str) -> list[Case]:
    """Ours, torch with all logits at once, and the peers, all with this loss, forward and backward."""
    terms = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
    ref = rows.ref if kl_coef else None

    def ours():
        loss, _ = ops.linear_ppo(
            rows.hidden,
            rows.weight,
            rows.targets,
            rows.old,
            rows.advantages,
            ref_logprobs=ref,
            **terms,
        )
        return rows.gradients(loss)

    def materialised(head: Callable = lambda hidden, weight: (hidden @ weight.T).float()):
        log_p = torch.log_softmax(head(rows.hidden, rows.weight), dim=1)
        logprobs = log_p.gather(1, rows.targets[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(dim=1) if entropy_coef else None
        return rows.loss(logprobs, entropy, kl_coef, entropy_coef)

    def compiled():
        return rows.gradients(torch.compile(materialised)())

    def liger():
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Head,
        )

        result = Head.apply(rows.hidden, rows.weight, rows.targets, 1.0, -100, 1, entropy_coef != 0)
        nll, entropy = result if entropy_coef else (result, None)
        return rows.gradients(rows.loss(-nll, entropy, kl_coef, entropy_coef))

    def verl():
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            _FusedLinearPPOFallbackFunction as Head,
        )

        result = Head.apply(rows.hidden, rows.weight, rows.targets, 1.0, -100, entropy_coef != 0)
        nll, entropy = result if entropy_coef else (result, None)
        return rows.gradients(rows.loss(-nll, entropy, kl_coef, entropy_coef))

    def cut_cross_entropy():
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(rows.hidden, rows.weight, rows.targets, reduction="none")
        return rows.gradients(rows.loss(-nll.float(), None, kl_coef, entropy_coef))

    def check(call):
        """Losses to 1 %, gradients to 3 % of their norm: the peers round logits to bfloat16."""

        def run():
            for x, y in zip(call(), rows.gradients(materialised()), strict=True):
                x, y = x.float(), y.float()
                error = (x - y).norm() / y.norm().clamp(min=1e-9)
                assert error < 0.03, f"{error:.3g} away from torch"

        return run

    flops = 6 * rows.n * rows.h * rows.v
    peers = {
        "torch": lambda: rows.gradients(materialised()),
        "torch.compile": compiled,
        "liger": liger,
        "verl's fused torch": verl,
    }
    if entropy_coef == 0:
        peers["cut-cross-entropy"] = cut_cross_entropy
    return [
        Case(name, "ours", ours, check(ours), flops=flops),
        *(
            Case(name, peer, call, check(call), flops=flops, compared_with=name)
            for peer, call in peers.items()
        ),
    ]


def memory_beyond_gradients(rows: Rows) -> float:
    """Megabytes (10^6) that the op itself takes beside its results: loss, metrics and the gradients."""
    arguments = (
        rows.hidden.detach(),
        rows.weight.detach(),
        None,
        rows.targets,
        rows.old,
        rows.advantages,
        rows.ref,
    )
    options = (1.0, None, 0.2, 0.2, 3.0, 0.01, 0.001, None, True, True, False)
    torch.ops.hiper_fast.linear_ppo(*arguments, *options)  # cuBLAS's workspace is taken once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = torch.ops.hiper_fast.linear_ppo(*arguments, *options)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)) / 1e6


def parts_of_linear_ppo(rows: Rows) -> dict[str, float]:
    """Where its time goes: each kind of product and row kernel alone, all chunks of one call; milliseconds."""
    from hiper_fast.kernels import _head

    head = _head.Head(
        rows.hidden.detach(),
        rows.weight.detach(),
        None,
        rows.targets,
        1.0,
        None,
        (True, True, False),
    )
    logprobs, slope, entropy, entropy_slope = head.logits.new_zeros(4, rows.n).unbind(0)
    chunks, fillings = rows.n / head.chunk, rows.n / len(head.rows)
    part, logits = slice(0, head.chunk), head.logits[:, : rows.v]
    gradient, hidden = head.rows[:, : rows.v], head.hidden[: len(head.rows)]

    def kernel():
        head.pending = 0
        head.gradient(part, entropy, slope, entropy_slope)

    calls = {
        "logits": (lambda: _head.product(logits, head.hidden[part], head.weight.T), chunks),
        "statistics": (lambda: head.statistics(part, logprobs, entropy), chunks),
        "gradient": (kernel, chunks),
        "grad_hidden": (
            lambda: _head.product(head.grad_hidden[: len(head.rows)], gradient, head.weight),
            fillings,
        ),
        "grad_weight": (
            lambda: _head.product(head.grad_weight, gradient.T, hidden, beta=1.0),
            fillings,
        ),
    }
    return {"chunk": head.chunk, "filling": len(head.rows)} | {
        name: milliseconds(call, "cuda") * times for name, (call, times) in calls.items()
    }


def measure(case: Case, device: str, ceiling: dict[str, float]) -> dict[str, object]:
    """A row of the result: its time and shares of the ceilings, or why there is none."""
    row = {"name": case.name, "implementation": case.implementation}
    try:
        case.check()
        spent = milliseconds(case.call, device, graph=case.graph)
    except (
        Exception
    ) as error:  # a peer that is missing or out of memory must not take the rest with it
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    row["milliseconds"] = spent
    if case.bytes:
        row["share_of_bandwidth"] = case.bytes / spent / 1e6 / ceiling["gigabytes_per_second"]
    if case.flops:
        row["teraflops"] = case.flops / spent / 1e9
        row["share_of_matmul"] = row["teraflops"] / ceiling["teraflops"]
    if case.name in TARGETS and case.implementation == "ours":
        row["target_milliseconds"] = TARGETS[case.name]
    return row


def add_ratios(rows: list[dict], cases: list[Case]) -> None:
    """Each peer's time over ours."""
    ours = {row["name"]: row.get("milliseconds") for row in rows if row["implementation"] == "ours"}
    for row, case in zip(rows, cases, strict=True):
        if case.compared_with and ours.get(case.compared_with) and "milliseconds" in row:
            row["times_ours"] = row["milliseconds"] / ours[case.compared_with]


def run(name: str, device: str, tests: bool, show: Callable[[str], None]) -> dict[str, object]:
    began, size = time.monotonic(), SIZES[name]
    result: dict[str, object] = facts(device) | {"size": size._asdict(), "figures": []}

    def left() -> float:
        return BUDGET - (time.monotonic() - began)

    if tests:
        result["tests"] = correctness(timeout=min(200, left()))
        show(f"tests: {result['tests']}")
    result["ceilings"] = ceilings(device)

    def default_loss():
        return linear_ppo_cases(Rows(size, device), 0.01, 0.001, "linear_ppo")

    def ratio_alone(clipped):
        return linear_ppo_cases(
            Rows(size, device, clipped), 0.0, 0.0, f"linear_ppo, ratio alone, {clipped:.0%} clipped"
        )

    groups = [
        lambda: step_cases(size, device),
        default_loss,
        lambda: ratio_alone(0.0),
        lambda: ratio_alone(0.5),
    ]
    for make in groups:
        if left() < 30 + ROLLOUT:
            result["left_out"] = "the last groups of figures: the time was spent"
            break
        cases = make()
        rows = []
        for case in cases:
            rows.append(measure(case, device, result["ceilings"]))
            show(json.dumps(rows[-1]))
        add_ratios(rows, cases)
        result["figures"] += rows
    if device == "cuda" and left() > 20 + ROLLOUT:
        rows = Rows(size, device)
        result["linear_ppo_megabytes_beyond_gradients"] = memory_beyond_gradients(rows)
        result["linear_ppo_parts"] = parts_of_linear_ppo(rows)
        del rows
    result["rollout"] = try_rollout(name, device)
    show(json.dumps(result["rollout"]))
    result["seconds"] = time.monotonic() - began
    return result


def try_rollout(name: str, device: str) -> dict[str, object]:
    """benchmarks/gpu_rollout.py's figures, or why there are none: they must not take the others with them."""
    try:
        return gpu_rollout.run(name, device, milliseconds)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--no-tests", action="store_true", help="only the figures")
    parser.add_argument(
        "--json",
        type=Path,
        help="the result's file [benchmarks/results/gpu-<name of the GPU>.json]",
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no NVIDIA GPU here; --device cpu --size tiny tries the script itself"
        )
    result = run(
        arguments.size,
        arguments.device,
        not arguments.no_tests,
        lambda line: print(line, flush=True),
    )
    name = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")
    path = arguments.json or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}\n{result['seconds']:.0f} s")
    return 0 if result.get("tests", {}).get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
