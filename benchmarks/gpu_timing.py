"""Times of calls on a device, as benchmarks/gpu.py and tune.py take them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from hiper_fast import bench

PER_GRAPH = 20  # calls in a CUDA graph


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
    """A replay of PER_GRAPH calls in one CUDA graph, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            call()
    graph.replay()
    return graph.replay


def time_once(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
