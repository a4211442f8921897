"""Tries the constants of each kernel's launch on the GPU at hand: tile sizes, warps, stages, chunks.

    python benchmarks/tune.py                            # writes the user's own table, in the cache folder
    python benchmarks/tune.py --write                    # the table that comes with the package
    python benchmarks/tune.py --dry-run --capability 90  # no GPU: which candidates one would take

A candidate must compile without spills and within a program's shared memory, with all of its kernel's options on too,
and agree with the reference; then it is timed, a median of replays of a CUDA graph. The default stays where no other
gains 2 %. Launches read the tables at their first (kernels/ops/_tuning.py).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from hiper_fast.kernels import _tuning
from hiper_fast.runs.folder import replace_text

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests/gpu")])
from gpu_timing import milliseconds
from tune_cases import CASES, Case

LEAST_GAIN = 0.02  # of the default's time, to leave it
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Bytes of shared memory that a program may take, by compute capability.
SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # fmt: skip

Values = dict[str, int | bool]


class Found(NamedTuple):
    kernel: str
    default: Values
    chosen: Values
    before: float  # milliseconds with the defaults
    after: float
    timed: int
    skipped: collections.Counter  # why -> how many

    def __str__(self) -> str:
        what = describe(self.chosen) if self.chosen != self.default else "the defaults"
        gain = 1 - self.after / self.before
        why = "".join(f"; {count} {reason}" for reason, count in self.skipped.items())
        times = f"{self.before:.4f} -> {self.after:.4f} ms ({gain:.1%} less)"
        return f"{self.kernel:<34} {what:<40} {times}, {self.timed} timed{why}"


def list_candidates(case: Case) -> Iterator[Values]:
    """Every combination, the defaults first."""
    for values in itertools.product(*case.candidates.values()):
        yield dict(zip(case.candidates, values, strict=True))


def describe(values: Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def find_misfit(case: Case, capability: int) -> str:
    """Why no GPU of that capability takes the kernel as it would be launched now; empty if one does."""
    import builds

    with builds.recording() as launches:
        case.prepare(True, torch.device("cpu"), torch.bfloat16).call()
    name = case.kernel.split()[0]
    for launch in launches.found.values():
        if name == f"{launch[0].module.rsplit('.', 1)[-1]}.{launch[0].__name__}":
            reason = judge(builds.build, launch, capability)
            if reason:
                return reason
    return ""


def judge(build: Callable[..., dict], launch: tuple, capability: int) -> str:
    """Why a launch does not fit, by its machine code."""
    try:
        built = build(launch, capability, whole=True)
    except Exception as error:
        return f"do not compile ({type(error).__name__})"
    if built["stack"]:
        return "spill"
    if built["shared"] > SHARED.get(capability, min(SHARED.values())):
        return "take too much shared memory"
    return ""


def check(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """AssertionError unless the launch gives the reference's results."""
    launch = case.prepare(True, device, dtype)
    for x, y in zip(launch.call(), launch.expected(), strict=True):
        scale = max(1.0, float(y.abs().max()))
        error = float((x.double() - y).abs().max()) / scale
        assert error <= TOLERANCE[dtype], f"{case.kernel}: {error:.2g} away from the reference"


def tune(
    case: Case, device: torch.device, dtype: torch.dtype, misfits: dict[str, str],
    clock: Callable[[Callable], float],
) -> Found:  # fmt: skip
    """The fastest of the candidates that fit and are right; RuntimeError if the defaults are not."""
    launch = case.prepare(False, device, dtype)
    candidates, times, skipped = list(list_candidates(case)), [], collections.Counter()
    for values in candidates:
        spent, reason = 0.0, misfits.get(describe(values), "")
        if not reason:
            spent, reason = try_values(case, values, device, dtype, clock, launch.call)
        if reason and not times:
            raise RuntimeError(f"the defaults {reason}")
        if reason:
            skipped[reason] += 1
        else:
            times.append((spent, values))
    before, default = times[0]
    after, chosen = min(times, key=lambda pair: pair[0])
    if after > (1 - LEAST_GAIN) * before:
        after, chosen = before, default
    return Found(case.kernel, default, chosen, before, after, len(times), skipped)


def try_values(
    case: Case, values: Values, device: torch.device, dtype: torch.dtype,
    clock: Callable[[Callable], float], call: Callable,
) -> tuple[float, str]:  # fmt: skip
    """Milliseconds of a call with these constants, or why there are none."""
    with _tuning.trying(case.kernel, **values):
        try:
            check(case, device, dtype)
            return clock(call), ""
        except AssertionError:
            return 0.0, "are wrong"
        except Exception as error:  # as a driver refuses a launch
            return 0.0, f"fail ({type(error).__name__})"


def write_table(path: Path, device: str, found: list[Found]) -> None:
    """Into the device's part of a file, in one move, defaults too: they go before what is shipped."""
    table = _tuning.read_table(path, device)
    content = json.loads(path.read_text()) if path.exists() else {}
    table |= {one.kernel: one.chosen for one in found}
    content[device] = dict(sorted(table.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=2) + "\n")


def screen(cases: list[Case], capability: int, jobs: int) -> Iterator[tuple[str, str, str]]:
    """Kernel, candidate as `describe` has it, and why it does not fit; built in so many processes."""
    tasks = [
        (case.kernel, values, capability) for case in cases for values in list_candidates(case)
    ]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        reasons = pool.map(screen_one, tasks)
        for (kernel, values, _), reason in zip(tasks, reasons, strict=True):
            yield kernel, describe(values), reason


def screen_one(task: tuple[str, Values, int]) -> str:
    kernel, values, capability = task
    case = next(case for case in CASES if case.kernel == kernel)
    with _tuning.trying(kernel, **values):
        return find_misfit(case, capability)


def show_fitting(screened: Iterator[tuple[str, str, str]]) -> None:
    for kernel, candidates in itertools.groupby(screened, key=lambda one: one[0]):
        print(kernel)
        for _, candidate, reason in candidates:
            print(f"  {candidate:<44} {reason and f'would {reason}'}".rstrip(), flush=True)


def run(cases: list[Case], path: Path, jobs: int) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    name = _tuning.describe_device(device)
    misfits: dict[str, dict[str, str]] = {case.kernel: {} for case in cases}
    for kernel, candidate, reason in screen(cases, 10 * major + minor, jobs):
        misfits[kernel][candidate] = reason
    print(f"{name}; the table is {path}", flush=True)
    failed = 0
    for case in cases:
        try:
            found = tune(
                case, device, torch.bfloat16, misfits[case.kernel],
                lambda call: milliseconds(call, "cuda", graph=True, repeats=9),
            )  # fmt: skip
        except Exception as error:
            failed += 1
            print(f"{case.kernel:<34} {type(error).__name__}: {error}", flush=True)
            continue
        write_table(path, name, [found])
        print(found, flush=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="into the package's own table")
    parser.add_argument("--kernels", default="", help="only those whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="only list what would fit")
    parser.add_argument("--capability", type=int, default=90, help="of the dry run's GPU [90]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="builds at once [cores]")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.kernels in case.kernel]
    if not cases:
        parser.error(f"no kernel's name holds {arguments.kernels!r}")
    if arguments.dry_run:
        show_fitting(screen(cases, arguments.capability, arguments.jobs))
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --dry-run lists what one would take")
    path = _tuning.SHIPPED if arguments.write else _tuning.cache_file()
    try:
        _tuning.read_table(path, "")
    except ValueError as error:
        parser.error(f"{error}; remove it first")
    return run(cases, path, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
