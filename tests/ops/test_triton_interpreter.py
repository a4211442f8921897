"""The Triton kernels without a GPU: tests/gpu under Triton's interpreter, each file in a process of its own.

Triton decides when a kernel is defined whether it is interpreted, so it cannot be done in this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("Triton 3.6's interpreter needs numpy < 2.4", allow_module_level=True)

FILES = (
    "test_scan_kernels",
    "test_loss_kernels",
    "test_head_kernels",
    "test_roles_kernel",
    "test_attention_kernel",
    "test_sample_kernel",
    "test_layer_kernels",
    "test_tuning_kernels",
)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(root / "ops"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    done = subprocess.run(
        [*command, str(root / "gpu" / f"{file}.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_file_of_kernel_tests_is_run():
    kernel_files = {
        path.stem for path in (Path(__file__).parents[1] / "gpu").glob("test_*kernel*.py")
    }
    assert kernel_files == set(FILES)
