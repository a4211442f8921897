"""What benchmarks/gpu.py runs before it measures: the kernels' tests, a file to a process, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
SCANS = ROOT / "tests/gpu/test_scan_kernels.py"
TOOLS = "memcheck", "racecheck"
FOUND = 86  # the exit status that the tool is told to have for errors of the kernels


def correctness(timeout: float, files: list[Path] | None = None) -> dict[str, object]:
    """The kernels' and the ops' tests on this GPU: files in parallel, and what of them failed."""
    files = files or sorted((ROOT / "tests/gpu").glob("test_*.py"))
    with ThreadPoolExecutor(max(1, min(len(files), (os.cpu_count() or 1) - 1))) as pool:
        results = list(pool.map(lambda file: run_tests(file, timeout), files))
    total = {word: sum(r[word] for r in results) for word in ("passed", "failed", "skipped")}
    by_file = {file.stem: result for file, result in zip(files, results, strict=True)}
    return {**total, "ok": all(result["ok"] for result in results), "files": by_file}


def run_tests(file: Path, timeout: float) -> dict[str, object]:
    status, output = run_command([*PYTEST, str(file)], timeout)
    return judge(status, output)


def run_command(command: list[str], timeout: float) -> tuple[int | None, str]:
    """(exit status, output); None for what was not done in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return None, f"not done after {timeout:.0f} s"
    return done.returncode, done.stdout + done.stderr


def judge(status: int | None, output: str) -> dict[str, object]:
    """`ok` is None for what was not done in time: nothing was found, and not all was looked at."""
    result = read_counts(output) | {"ok": None if status is None else status == 0}
    return result if result["ok"] else result | {"output": output[-6000:]}


def read_counts(output: str) -> dict[str, int]:
    """pytest's closing line as numbers; errors are failures."""
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for number, word in found:
        counts["failed" if word == "error" else word] += int(number)
    return counts


def sanitize(timeout: float) -> dict[str, object]:
    """compute-sanitizer over the scans' tests, its tools at the same time; why not, where it is not on the PATH."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = pool.map(lambda tool: run_sanitizer(program, tool, timeout), TOOLS)
        return dict(zip(TOOLS, found, strict=True))


def run_sanitizer(program: str, tool: str, timeout: float) -> dict[str, object]:
    options = ["--tool", tool, "--error-exitcode", str(FOUND)]
    return judge(*run_command([program, *options, *PYTEST, str(SCANS)], timeout))


def unpack_wheels(folder: Path, target: str) -> list[str]:
    """Makes a folder's pure wheels importable from `target`, behind what is installed; the wheels' names."""
    wheels = sorted(folder.glob("*-none-any.whl")) if folder.is_dir() else []
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(target)  # Triton reads its kernels' source from files
    sys.path.append(target)
    return [wheel.name for wheel in wheels]
