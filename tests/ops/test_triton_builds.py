"""Every kernel in every configuration that can be launched is built for A100 and Hopper: no spills, few registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Registers a thread at most; above them fewer programs share a processor than the kernel's design counts on. In
# float64, which no training uses, only spills are forbidden.
CEILINGS = {
    "hae._kernel": 168,
    "gae._kernel": 128,
    "normalize._moments_kernel": 80,
    "normalize._normalize_kernel": 88,
    "scatter_advantages._moments_kernel": 128,
    "scatter_advantages._scatter_kernel": 128,
    "find_roles._kernel": 128,
    "_policy._terms_kernel": 104,
    "_total._finish_kernel": 64,
    "value_loss._kernel": 80,
    "paged_attention._kernel": 255,  # as much where a pool is not aligned; else 193
    "paged_attention._merge_kernel": 128,
    "_head._statistics_kernel": 128,
    "_head._gradient_kernel": 84,
    "rms_norm._forward_kernel": 96,
    "rms_norm._backward_kernel": 128,
    "swiglu._forward_kernel": 64,
    "swiglu._backward_kernel": 64,
    "rope._kernel": 96,
}


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def builds(request, tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).parents[1] / "gpu" / "builds.py"
    done = subprocess.run(
        [sys.executable, str(script), str(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(1600)
def test_all_kernels_are_built(builds):
    assert {build["kernel"] for build in builds} == set(CEILINGS)
    halves = {t for build in builds for t in build["dtypes"]} & {"*bf16", "*fp16"}
    assert halves == {"*bf16", "*fp16"}


@pytest.mark.timeout(1600)
def test_nothing_spills(builds):
    assert not [build for build in builds if build["stack"]]


@pytest.mark.timeout(1600)
def test_registers_stay_below_their_ceilings(builds):
    wide = [b for b in builds if b["registers"] > CEILINGS[b["kernel"]] and not wholly_double(b)]
    assert not wide


def wholly_double(build):
    """float64 vectors; sums of blocks are float64 also for float32 vectors."""
    return "*fp32" not in build["dtypes"] and "*fp64" in build["dtypes"]
