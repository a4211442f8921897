"""All that needs a GPU, in under eight minutes: the kernels' tests, their times beside their peers', a whole step.

    pip install --no-build-isolation --no-deps -e . && python benchmarks/gpu.py

writes benchmarks/results/gpu-<name of the GPU>.json. Peers that are not installed (liger-kernel, cut-cross-entropy) are
taken from the wheels in --wheels, if there are any, else left out with the reason, as flash-attn is. A figure comes
only after its results agree with the reference's; what fails is told in its place, and what there was no time for is
named. Times are medians in milliseconds, of CUDA graph replays where a whole call fits in one; a call that
refuses to be in one is timed without, and its row says so. `--device cpu --size tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from hiper_fast import bench

sys.path.append(str(Path(__file__).parent))
import gpu_checks
import gpu_head
import gpu_ops
import gpu_rollout
import gpu_timing
import gpu_update
from gpu_timing import Case, attempt

ROOT = Path(__file__).resolve().parents[1]
TESTS = 170  # seconds for the tests, at most
PACKAGES = "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn"


class Size(NamedTuple):
    """One HiPER step, and one microbatch of loss rows at a model's head."""

    trajectories: int
    turns: int  # of each
    tokens: int  # of each response
    rows: int
    width: int
    vocabulary: int
    packed: tuple[int, int]  # sequences of a microbatch, and tokens of each


SIZES = {
    "full": Size(128, 50, 281, 16_384, 1536, 151_936, (10, 800)),
    "tiny": Size(4, 5, 40, 16, 12, 50, (2, 12)),
}
TARGETS = {
    "hae + normalise + scatter": 0.015,
    "linear_ppo": 34.0,
}  # milliseconds, on an H200, at full size


def describe(device: str, wheels: list[str]) -> dict[str, object]:
    """What a figure depends on beside the code, and which code it was."""

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    git = "git", "-C", str(ROOT)
    changed = " and changes" if run(*git, "status", "--porcelain") else ""
    driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return bench.describe_machine() | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": driver.split("\n")[0],
        "commit": run(*git, "rev-parse", "HEAD") + changed,
        "versions": {name: find_version(name) for name in PACKAGES},
        "wheels": wheels,
    }


def find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Stage(NamedTuple):
    """A part of the script, which begins only with so many seconds left."""

    name: str
    seconds: float
    run: Callable[[], object]


class Session:
    """What one run of the script has measured so far, and how much time is left to it."""

    def __init__(self, size: str, device: str, minutes: float, show: Callable[[str], None]):
        self.name, self.size, self.device, self.show = size, SIZES[size], device, show
        self.ends = time.monotonic() + 60 * minutes
        self.ceiling: dict[str, float] = {}  # empty: not found
        self.left_out: list[str] = []

    def left(self) -> float:
        return self.ends - time.monotonic()

    def list_stages(self, tests: bool) -> Iterator[Stage]:
        """In the order of what they are worth; those on a GPU alone only there."""
        size, device, on_gpu = self.size, self.device, self.device == "cuda"
        if tests:
            yield Stage("checks", 30, self.check)
        yield Stage("ceilings", 5, self.find_ceilings)
        step = bench.Size(size.trajectories, size.turns, size.tokens, 8, 8, 50)
        yield self.figures("ops", 20, lambda: gpu_ops.step_cases(step, device))
        yield self.head_figures("linear_ppo", 0.01, 0.001, 0.0)
        yield Stage("rollout", 100, lambda: gpu_rollout.run(self.name, device, self.left))
        yield Stage("update", 40, lambda: gpu_update.run(self.name, device, self.ceiling))
        if on_gpu:
            yield Stage("linear_ppo, memory and parts", 15, self.inspect_head)
        yield self.figures(
            "sample", 10, lambda: gpu_ops.sample_cases(size.trajectories, size.vocabulary, device)
        )
        yield self.figures("layers", 20, lambda: gpu_ops.layer_cases(size.rows, size.width, device))
        yield self.figures(
            "attention", 10, lambda: gpu_ops.attention_cases(*size.packed, device=device)
        )
        for clipped in (0.0, 0.5):
            yield self.head_figures(
                f"linear_ppo, ratio alone, {clipped:.0%} clipped", 0.0, 0.0, clipped
            )

    def check(self) -> dict[str, object]:
        """The tests, and beside them the sanitizer: neither has its time taken."""
        timeout = min(TESTS, self.left())
        with ThreadPoolExecutor() as pool:
            sanitizer = pool.submit(attempt, lambda: gpu_checks.sanitize(timeout))
            return {"tests": gpu_checks.correctness(timeout), "sanitizer": sanitizer.result()}

    def find_ceilings(self) -> dict[str, float]:
        self.ceiling = gpu_timing.ceilings(self.device)
        return self.ceiling

    def head_figures(self, name: str, kl: float, entropy: float, clipped: float) -> Stage:
        def make() -> list[Case]:
            size = self.size
            rows = gpu_head.Rows(size.rows, size.width, size.vocabulary, self.device, clipped)
            return gpu_head.head_cases(rows, kl, entropy, name)

        return self.figures(name, 25, make)

    def inspect_head(self) -> dict[str, object]:
        size = self.size
        rows = gpu_head.Rows(size.rows, size.width, size.vocabulary, self.device)
        return {
            "megabytes_beyond_gradients": attempt(lambda: gpu_head.memory_beyond_gradients(rows)),
            "milliseconds": attempt(lambda: gpu_head.parts_of_linear_ppo(rows)),
        }

    def figures(self, name: str, seconds: float, make: Callable[[], list[Case]]) -> Stage:
        """Of cases, each shown as it comes; each begins only with the stage's seconds left."""

        def run() -> list[dict]:
            cases, rows = make(), []
            for case in cases:
                if self.left() < seconds:
                    self.left_out.append(f"{case.name}, {case.implementation}")
                    continue
                row = self.measure(case)
                gpu_timing.compare(row, case, rows)
                rows.append(row)
                self.show(json.dumps(row))
            return rows

        return Stage(name, seconds, run)

    def measure(self, case: Case) -> dict[str, object]:
        row = gpu_timing.measure(case, self.device, self.ceiling)
        if case.name in TARGETS and case.implementation == "ours":
            row["target_milliseconds"] = TARGETS[case.name]
        return row

    def run(self, tests: bool) -> dict[str, object]:
        result = {}
        for stage in self.list_stages(tests):
            if self.left() < stage.seconds:
                self.left_out.append(stage.name)
                continue
            began = time.monotonic()
            result[stage.name] = attempt(stage.run)
            spent = time.monotonic() - began
            self.show(f"{stage.name}: {spent:.0f} s, {self.left():.0f} s left")
            if self.device == "cuda":
                attempt(torch.cuda.empty_cache)  # refused after a capture that failed
        return result | {"left_out": self.left_out}


def has_passed(result: dict) -> bool:
    """Neither a test nor the sanitizer found anything."""
    checks = result.get("checks", {})
    tools = checks.get("sanitizer", {}).values()
    sane = not any(tool["ok"] is False for tool in tools if isinstance(tool, dict))
    return "error" not in checks and checks.get("tests", {}).get("ok", True) and sane


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--minutes", type=float, default=8, help="what it may take [8]")
    parser.add_argument("--no-tests", action="store_true", help="only the figures")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="a folder of peers' wheels [wheels/]"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="the result's file [benchmarks/results/gpu-<name of the GPU>.json]",
    )
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no NVIDIA GPU here; --device cpu --size tiny tries the script itself"
        )
    began = time.monotonic()
    session = Session(
        arguments.size, device, arguments.minutes, lambda line: print(line, flush=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        wheels = gpu_checks.unpack_wheels(arguments.wheels, folder)
        result = describe(device, wheels) | {"size": session.size._asdict()}
        result |= session.run(not arguments.no_tests)
    result["seconds"] = time.monotonic() - began
    name = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")
    path = arguments.json or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}\n{result['seconds']:.0f} s")
    return 0 if has_passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
