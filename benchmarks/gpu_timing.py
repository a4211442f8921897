"""How benchmarks/gpu.py and tune.py measure: times of calls, cases behind a check, kernels launched."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hiper_fast import bench

PER_GRAPH = 20  # calls in a CUDA graph


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


def attempt(call: Callable[[], object]) -> object:
    """What a call gives, or {"error": why it gave nothing}: a part that fails must not take the rest with it."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def milliseconds(
    call: Callable[[], object], device: str, *, graph: bool = False, repeats: int = 20
) -> float:
    """Median of a call after warming up; `graph`: of replays of its CUDA graph, PER_GRAPH calls in it."""
    if device == "cpu":
        return 1e3 * bench.measure(call, "cpu", budget=0.02)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        call = capture(call)
    times = [time_once(call) for _ in range(repeats)]
    return statistics.median(times) / (PER_GRAPH if graph else 1)


def capture(call: Callable[[], object]) -> Callable[[], None]:
    """A replay of PER_GRAPH calls in one CUDA graph, replayed once; an exception where a graph takes no such call."""
    refuse_waiting(call)
    graph = torch.cuda.CUDAGraph()
    # Where the capture's end fails, torch.cuda.graph leaves its own stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            call()
    graph.replay()
    return graph.replay


def refuse_waiting(call: Callable[[], object]) -> None:
    """RuntimeError of a call that waits for the GPU, which no graph holds.

    Found out before the capture: after one that failed, torch's allocator (2.11's for one) counts it as under way for
    good, empties no cache and begins no other capture.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def time_once(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a large copy and TFLOP/s of a large bfloat16 product: what the shares are of."""
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(n * n * 8, device=device)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source), device)
    return {
        "gigabytes_per_second": 2 * source.nbytes / copied / 1e6,
        "teraflops": 2 * n**3 / milliseconds(lambda: a @ b, device) / 1e9,
    }


def measure(case: Case, device: str, ceiling: dict[str, float]) -> dict[str, object]:
    """A row of the result: its time and shares of the ceilings, or why there is none."""
    row = {"name": case.name, "implementation": case.implementation}

    def checked() -> dict[str, object]:
        case.check()
        return time_case(case, device)

    row |= attempt(checked)
    if "error" in row:
        return row
    spent = row["milliseconds"]
    if case.bytes and ceiling:
        row["share_of_bandwidth"] = case.bytes / spent / 1e6 / ceiling["gigabytes_per_second"]
    if case.flops:
        row["teraflops"] = case.flops / spent / 1e9
        row |= share_of_matmul(row["teraflops"], ceiling)
    return row


def time_case(case: Case, device: str) -> dict[str, object]:
    """Its milliseconds, and on a GPU whether they are of a graph; why not, if its call refused one."""
    if not case.graph or device == "cpu":
        return {"milliseconds": milliseconds(case.call, device)}
    found = attempt(
        lambda: {"milliseconds": milliseconds(case.call, device, graph=True), "graph": True}
    )
    if "error" not in found:
        return found
    return {
        "milliseconds": milliseconds(case.call, device), "graph": False, "refused": found["error"],
    }  # fmt: skip


def share_of_matmul(teraflops: float, ceiling: dict[str, float]) -> dict[str, float]:
    return {"share_of_matmul": teraflops / ceiling["teraflops"]} if ceiling else {}


def compare(row: dict, case: Case, rows: list[dict]) -> None:
    """Adds a peer's time over ours, and what to know of it where one of the two alone was in a graph."""
    ours = [x for x in rows if (x["name"], x["implementation"]) == (case.compared_with, "ours")]
    if not all("milliseconds" in x for x in (row, *ours)) or not ours:
        return
    row["times_ours"] = row["milliseconds"] / ours[0]["milliseconds"]
    graphs = row.get("graph", False), ours[0].get("graph", False)
    if graphs[0] != graphs[1]:
        which = "ours" if graphs[0] else case.implementation
        row["unequal"] = f"{which} without a graph: its time counts the host's launches too"


def assert_near(result, expected, tolerance: float = 1e-4) -> None:
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(
            x.cpu().double(), y.cpu().double(), rtol=tolerance, atol=tolerance
        )


def assert_near_in_norm(result, expected, tolerance: float = 0.03) -> None:
    """By the norm of the difference: for implementations that round where others do not."""
    for x, y in zip(result, expected, strict=True):
        x, y = x.float(), y.float()
        error = (x - y).norm() / y.norm().clamp(min=1e-9)
        assert error < tolerance, f"{error:.3g} away from torch"


def count_launches(call: Callable[[], object], device: str) -> dict[str, int]:
    """What torch's profiler sees of a call: kernels and copies on the GPU, launches of the host, operations."""
    call()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    counts = Counter(classify(event.name, event.device_type) for event in found.events())
    return {kind: count for kind, count in counts.items() if kind}


def classify(name: str, device: DeviceType) -> str:
    if device == DeviceType.CUDA:
        return "on_gpu"
    if "LaunchKernel" in name:
        return "launches"
    if "GraphLaunch" in name:
        return "graphs"
    return "operations" if name.startswith(("aten::", "hiper_fast::")) else ""


def differentiate(function: Callable, grads, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Results and gradients of `leaves`, which require them, for the results' `grads`."""
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)


def differentiate_exactly(function: Callable, grads, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The same in float64, of leaves that need not require gradients."""
    exact = (x.double().requires_grad_() for x in leaves)
    return differentiate(function, [grad.double() for grad in grads], *exact)
