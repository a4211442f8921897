"""Every kernel in every configuration that can be launched is built for A100 and Hopper: no spills, few registers."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Registers a thread at most; above them fewer programs share a processor than the kernel's design counts on. In
# float64, which no training uses, only spills are forbidden.
CEILINGS = {
    "hae._kernel": 168,
    "gae._kernel": 128,
    "normalize._moments_kernel": 64,
    "normalize._normalize_kernel": 48,
    "scatter_advantages._moments_kernel": 128,
    "scatter_advantages._scatter_kernel": 128,
    "find_roles._kernel": 128,
    "_policy._terms_kernel": 112,
    "_total._finish_kernel": 64,
    "value_loss._kernel": 64,
    "scale_gradients._kernel": 84,  # where a gradient is not aligned; else 32
    "paged_attention._kernel": 255,  # as much where a pool is not aligned; else 193
    "paged_attention._merge_kernel": 128,
    "sample._parts_kernel": 32,
    "sample._draw_kernel": 128,
    "_head._statistics_kernel": 128,
    "_head._gradient_kernel": 84,
    "_tiles._tile_kernel": 255,  # one program a processor: half of them hold the sums of its tile
    "_tiles._merge_kernel": 128,
    "_tiles._gradient_kernel": 72,
    "rms_norm._forward_kernel": 96,
    "rms_norm._backward_kernel": 128,
    "swiglu._forward_kernel": 64,
    "swiglu._backward_kernel": 64,
    "rope._kernel": 96,
}

# Kernels that move whole rows: least shares of the bytes that their loads and stores move in vectors of 16. The rest
# are numbers a row. What masks by a size that is not specialised falls to 4 bytes a load, or 2.
VECTORS = {
    "_head._statistics_kernel": (0.9, 0.0),
    "_head._gradient_kernel": (0.6, 0.7),
    "_tiles._gradient_kernel": (0.4, 0.9),
    "_total._finish_kernel": (0.9, 0.0),
    # These have every access twice: in vectors, and number by number for a block that is not whole or not aligned.
    "_policy._terms_kernel": (0.45, 0.4),
    "value_loss._kernel": (0.45, 0.4),
    "normalize._moments_kernel": (0.4, 0.0),
    "normalize._normalize_kernel": (0.4, 0.4),
    "scale_gradients._kernel": (0.8, 0.9),
    "sample._parts_kernel": (0.45, 0.0),
    "sample._draw_kernel": (0.35, 0.0),
    "paged_attention._kernel": (0.8, 0.6),
    "rms_norm._forward_kernel": (0.9, 0.9),
    "rms_norm._backward_kernel": (0.9, 0.0),
    "swiglu._forward_kernel": (0.9, 0.9),
    "swiglu._backward_kernel": (0.9, 0.9),
}
SPARED = {}  # kernel: bytes of spills a thread that are let be
if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):
    # By Triton 3.6 some take more: a processor holds three programs, of the two that it is given, and four, as by 3.9.
    CEILINGS |= {"scatter_advantages._moments_kernel": 168, "_policy._terms_kernel": 128}
    # Its ptxas lets four registers of float32 attention go to fit one program more, in whatever tiles and stages.
    SPARED = {"paged_attention._kernel": 16}
    VECTORS["paged_attention._kernel"] = 0.65, 0.6  # it reads its table of blocks more often

SHARED = 227 * 1024  # bytes of shared memory that a program can have on Hopper
SCRIPT = Path(__file__).parents[1] / "gpu" / "builds.py"
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def builds(request, tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(1600)
def test_all_kernels_are_built(request, builds):
    built = {build["kernel"] for build in builds}
    here = {
        kernel
        for kernel in CEILINGS
        if request.node.callspec.id == "sm_90" or "_tiles." not in kernel
    }
    assert built == here
    halves = {t for build in builds for t in build["dtypes"]} & {"*bf16", "*fp16"}
    assert halves == {"*bf16", "*fp16"}


@pytest.mark.timeout(1600)
def test_nothing_spills(builds):
    assert not [build for build in builds if build["stack"] > SPARED.get(build["kernel"], 0)]


@pytest.mark.timeout(1600)
def test_registers_stay_below_their_ceilings(builds):
    wide = [b for b in builds if b["registers"] > CEILINGS[b["kernel"]] and not b["double"]]
    assert not wide


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("kind, place", [("loads", 0), ("stores", 1)])
def test_rows_move_in_vectors(builds, kind, place):
    moving = [b for b in builds if b["kernel"] in VECTORS and b["aligned"] and not b["double"]]
    scalar = [b for b in moving if vector_share(b[kind]) < VECTORS[b["kernel"]][place]]
    assert moving and not scalar


@pytest.mark.timeout(1600)
def test_the_tiled_head_multiplies_and_moves_its_tiles_as_hopper_can(builds):
    """Warp-group products, each factor's tiles by descriptor in and the shares' out, in a processor's shared memory."""
    for build in (b for b in builds if b["kernel"] == "_tiles._tile_kernel"):
        stages, halves = 4, 2 * build["constants"]["KEEP"]
        assert build["wgmma"] and build["tma"] >= 2 * stages + halves
        assert build["shared"] <= SHARED


@pytest.mark.timeout(1600)
def test_the_docs_show_what_is_built(request, builds):
    architecture = request.node.callspec.id
    text = DOCS.read_text()
    if f"Triton {version('triton')}, {architecture}:" not in text:
        pytest.skip("the table is of another Triton or architecture")
    lines = "".join(json.dumps(build) + "\n" for build in builds)
    command = [sys.executable, str(SCRIPT), "table"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stdout in text, f"docs/kernels.md lacks\n{done.stdout}"


def vector_share(accesses):
    """Of {bytes of an access: how many}."""
    moved = {int(size): int(size) * number for size, number in accesses.items()}
    return sum(b for size, b in moved.items() if size >= 16) / max(1, sum(moved.values()))
