"""benchmarks/gpu.py: what of it can be tried without a GPU."""

import contextlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gpu_checks
import gpu_head
import gpu_rollout
import gpu_timing
import pytest
import torch

from hiper_fast import ops

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
specification = importlib.util.spec_from_file_location("gpu_script", PATH)
script = importlib.util.module_from_spec(specification)
sys.modules["gpu_script"] = script
specification.loader.exec_module(script)

TRY = ["--device", "cpu", "--size", "tiny", "--no-tests"]
OPS = {
    "find_roles",
    "hae",
    "gae",
    "scatter_advantages",
    "paged_attention",
    "ppo_loss",
    "value_loss",
}
ANYWHERE = {"ours", "torch", "torch.compile", "torch in groups"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Its result on the CPU, without the compiler: that takes seconds, and is not what is tried."""
    path = tmp_path_factory.mktemp("gpu") / "r.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        assert script.main([*TRY, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_it_says_where_it_ran(whole):
    assert {"date", "device", "driver", "versions", "commit", "ceilings", "seconds"} <= set(whole)
    assert set(whole["versions"]) == set(script.PACKAGES) and whole["left_out"] == []


@pytest.mark.parametrize(
    "stage, names",
    [("ops", OPS | {"hae + normalise + scatter"}), ("layers", {"rms_norm", "swiglu", "rope"}),
     ("linear_ppo", {"linear_ppo"}), ("sample", {"sample"})],
)  # fmt: skip
def test_figures(whole, stage, names):
    ours = [row for row in whole[stage] if row["implementation"] == "ours"]
    assert {row["name"] for row in ours} == names
    torchs = [row for row in whole[stage] if row["implementation"] == "torch"]
    assert torchs and all(row["times_ours"] > 0 for row in torchs)


def test_only_what_is_not_here_fails(whole):
    stages = [stage for stage in whole.values() if isinstance(stage, list)]
    rows = [row for stage in stages for row in stage if isinstance(row, dict)]
    assert {row["implementation"] for row in rows} > ANYWHERE
    assert not [row for row in rows if row["implementation"] in ANYWHERE and "error" in row]
    assert not [
        name for name, stage in whole.items() if isinstance(stage, dict) and "error" in stage
    ]


def test_a_step(whole):
    played = whole["rollout"]
    assert played["rollout"]["turns"] == 4 * 2 and played["rollout"]["response_tokens"] == 8 * 5
    assert 8 * 20 <= played["rollout"]["prompt_tokens"] <= 8 * 30
    step = played["decoding"]["operations"]
    assert set(step["milliseconds"]) == {"1", "3"} and step["launches"]["operations"] > 100
    assert played["update"]["share"] == 0.5 and played["update"]["skipped_steps"] == 0
    assert played["step_seconds"] > played["rollout"]["seconds"]
    assert {stage: set(sizes) for stage, sizes in played["gib"].items()} == {
        "in rollout": {"planned"}, "in scoring": {"planned"}, "in update": {"planned"},
    }  # fmt: skip


def test_a_rollout_that_would_take_too_long_is_left_out():
    played = gpu_rollout.run("tiny", "cpu", lambda: 0.0)
    assert "rollout" not in played and "the rollout" in played["skipped"]
    assert played["update"]["update_seconds"] > 0


def test_an_update_packed_and_padded(whole):
    packed, shared, padded = (whole["update"][name] for name in ("packed", "shared", "padded"))
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert shared["loss"] == pytest.approx(padded["loss"], rel=1e-4)
    assert (
        shared["computed_tokens"] < packed["computed_tokens"] < padded["computed_tokens"] == 5 * 160
    )
    assert whole["update"]["launches_a_microbatch"]["operations"] > 50


def test_without_time_the_rest_is_named(tmp_path):
    path = tmp_path / "r.json"
    assert script.main([*TRY, "--minutes", "0.15", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert "ceilings" in result and "ops" not in result
    assert {"ops", "linear_ppo", "rollout", "update", "attention"} <= set(result["left_out"])


def test_cases_stop_when_the_time_is_spent():
    session = script.Session("tiny", "cpu", 1, lambda line: None)
    cases = [gpu_timing.Case("x", name, lambda: None) for name in ("ours", "torch")]
    clock = iter([60, 5])
    session.left = lambda: next(clock)
    rows = session.figures("x", 10, lambda: cases).run()
    assert [row["implementation"] for row in rows] == ["ours"] and session.left_out == ["x, torch"]


def test_what_fails_is_told_and_the_rest_goes_on():
    session = script.Session("tiny", "cpu", 1, lambda line: None)
    stages = [script.Stage("a", 0, lambda: 1 / 0), script.Stage("b", 0, lambda: 3)]
    session.list_stages = lambda tests: stages
    result = session.run(False)
    assert result["a"]["error"].startswith("ZeroDivisionError") and result["b"] == 3


def test_a_wrong_result_has_no_time():
    def wrong():
        raise AssertionError("0.5 away from torch")

    row = gpu_timing.measure(gpu_timing.Case("x", "ours", lambda: None, wrong), "cpu", {})
    assert "milliseconds" not in row and "0.5 away" in row["error"]


def test_without_ceilings_there_are_times_still():
    case = gpu_timing.Case("x", "ours", lambda: None, bytes=8, flops=8)
    row = gpu_timing.measure(case, "cpu", {})
    assert row["milliseconds"] > 0 and not [key for key in row if key.startswith("share")]


class Card:
    """Stands for torch.cuda: events 5 ms apart; after an error the stream of a capture stays, as with torch."""

    def __init__(self, monkeypatch):
        self.stream, self.mode, self.replays, self.capturing = "default", "default", 0, False
        event = SimpleNamespace(record=int, synchronize=int, elapsed_time=lambda end: 5.0)
        for name, stand_in in {
            "Event": lambda enable_timing: event, "synchronize": lambda: None, "stream": self.on,
            "current_stream": lambda: self.stream, "CUDAGraph": lambda: self, "graph": self.capture,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def replay(self):
        self.replays += 1

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capture(self, graph):
        self.stream, self.capturing = "of the capture", True
        try:
            yield
        except Exception as error:
            raise RuntimeError("the capture was invalidated") from error
        finally:
            self.capturing = False
        self.stream = "default"

    def wait(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def refuse(self):
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_a_call_that_no_graph_takes_is_timed_without(monkeypatch):
    card = Card(monkeypatch)
    calls = {"ours": int, "waits": card.wait, "allocates": card.refuse, "takes part": int}
    session = script.Session("tiny", "cuda", 1, lambda line: None)
    cases = [
        gpu_timing.Case("x", name, call, graph=True, compared_with="" if name == "ours" else "x")
        for name, call in calls.items()
    ]
    ours, waits, allocates, part = session.figures("x", 0, lambda: cases).run()
    assert ours["graph"] and part["graph"] and card.replays == 2 * 21
    assert ours["milliseconds"] == 5 / gpu_timing.PER_GRAPH and part["times_ours"] == 1
    for row, reason in ((waits, "a synchronizing"), (allocates, "the capture was invalidated")):
        assert row["milliseconds"] == 5 and row["graph"] is False and reason in row["refused"]
        assert row["times_ours"] == gpu_timing.PER_GRAPH and "without a graph" in row["unequal"]
    assert "unequal" not in part and (card.stream, card.mode) == ("default", "default")


def test_half_of_the_rows_are_clipped():
    rows = gpu_head.Rows(16, 8, 50, "cpu", clipped=0.5)
    _, metrics = ops.linear_ppo(
        rows.hidden, rows.weight, rows.targets, rows.old, rows.advantages, entropy_coef=0.0
    )
    assert metrics["clip_fraction"] == 0.5


def test_it_reads_the_closing_line_of_pytest():
    assert gpu_checks.read_counts("...\n3 failed, 120 passed, 2 skipped, 1 error in 5s\n") == {
        "passed": 120,
        "failed": 4,
        "skipped": 2,
    }


def test_test_files_run_in_parallel(tmp_path):
    (tmp_path / "test_a.py").write_text("def test(): pass\n")
    (tmp_path / "test_b.py").write_text("def test(): assert False, 'a reason'\n")
    found = gpu_checks.correctness(100, sorted(tmp_path.glob("test_*.py")))
    assert (found["passed"], found["failed"], found["ok"]) == (1, 1, False)
    assert "a reason" in found["files"]["test_b"]["output"] and found["files"]["test_a"]["ok"]
    assert not script.has_passed({"checks": {"tests": found}})


def test_what_the_sanitizer_finds(tmp_path, monkeypatch):
    assert "skipped" in gpu_checks.sanitize(1) or gpu_checks.shutil.which("compute-sanitizer")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nprint(sys.argv[2])\nsys.exit(86 * ('racecheck' in sys.argv))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_checks.sanitize(100)
    assert found["memcheck"]["ok"] and not found["racecheck"]["ok"]
    assert "racecheck" in found["racecheck"]["output"]
    assert not script.has_passed({"checks": {"tests": {"ok": True}, "sanitizer": found}})
    late = gpu_checks.judge(None, "not done after 3 s")
    assert script.has_passed({"checks": {"tests": {"ok": True}, "sanitizer": {"memcheck": late}}})


def test_wheels_are_found(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "carried_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_peer/__init__.py", "there = True\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    target = tmp_path / "out"
    found = gpu_checks.unpack_wheels(tmp_path, str(target))
    assert found == ["carried_peer-1.0-py3-none-any.whl"]
    assert importlib.import_module("carried_peer").there
    assert gpu_checks.unpack_wheels(tmp_path / "nowhere", str(target)) == []


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script.main([])
    assert "no NVIDIA GPU" in capsys.readouterr().err
