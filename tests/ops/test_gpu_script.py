"""benchmarks/gpu.py: what of it can be tried without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hiper_fast import ops

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
specification = importlib.util.spec_from_file_location("gpu_script", PATH)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def test_it_runs_whole_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # seconds, and not what is tried here
    assert (
        script.main(
            ["--device", "cpu", "--size", "tiny", "--no-tests", "--json", str(tmp_path / "r.json")]
        )
        == 0
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"date", "device", "versions", "commit", "ceilings", "figures", "seconds"} <= set(result)
    ours = [row for row in result["figures"] if row["implementation"] == "ours"]
    assert {"find_roles", "hae", "gae", "scatter_advantages", "ppo_loss", "linear_ppo"} <= {
        r["name"] for r in ours
    }
    assert all("milliseconds" in row for row in ours), ours
    played = result["rollout"]
    assert played["rollout"]["turns"] == 4 * 2 and played["rollout"]["response_tokens"] == 8 * 5
    assert 8 * 20 <= played["rollout"]["prompt_tokens"] <= 8 * 30
    assert set(played["milliseconds_a_step"]["operations"]) == {"1", "3"}
    assert played["update"]["share"] == 0.5 and played["update"]["skipped_steps"] == 0
    torchs = [row for row in result["figures"] if row["implementation"] == "torch"]
    assert len(torchs) == 4 and all(row["times_ours"] > 0 for row in torchs)
    absent = [row for row in result["figures"] if "error" in row]
    assert all(row["implementation"] not in ("ours", "torch", "torch.compile") for row in absent)


def test_a_wrong_result_has_no_time():
    def wrong():
        raise AssertionError("0.5 away from torch")

    row = script.measure(script.Case("x", "ours", lambda: None, wrong), "cpu", {})
    assert "milliseconds" not in row and "0.5 away" in row["error"]


def test_half_of_the_rows_are_clipped():
    rows = script.Rows(script.SIZES["tiny"], "cpu", clipped=0.5)
    _, metrics = ops.linear_ppo(
        rows.hidden, rows.weight, rows.targets, rows.old, rows.advantages, entropy_coef=0.0
    )
    assert metrics["clip_fraction"] == 0.5


def test_it_reads_the_closing_line_of_pytest():
    assert script.counts("...\n3 failed, 120 passed, 2 skipped in 5s\n") == {
        "passed": 120,
        "failed": 3,
        "skipped": 2,
    }


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script.main([])
    assert "no NVIDIA GPU" in capsys.readouterr().err
