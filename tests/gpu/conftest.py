"""Where the kernels' tests run: on the GPU, else under Triton's interpreter, by tests/ops/test_triton_interpreter.py.

On a GPU machine, once for each change of a kernel, also `compute-sanitizer --tool memcheck python -m pytest tests/gpu
-k "not compiled"`, then with `--tool racecheck` and `--tool initcheck`: out-of-bounds reads and races go unseen
elsewhere, and benchmarks/gpu.py runs but the first two, over the scans. PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes every
tensor an allocation of its own, so that none is out of sight.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device(interpreted) -> torch.device:
    if interpreted:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(
            "no NVIDIA GPU here; tests/ops/test_triton_interpreter.py runs this under Triton's interpreter"
        )
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def no_pending_error(device):
    """An error that a kernel reports comes with a later call: it must not come in a later test."""
    yield
    from hiper_fast.kernels import raise_pending

    raise_pending()


@pytest.fixture
def bfloat16_products(interpreted, monkeypatch):
    """Triton's interpreter holds bfloat16 as its 16 bits: it converts them rightly, but multiplies them as integers."""
    if not interpreted:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(builder, *factors_and_rest):
        a, b, *rest = factors_and_rest
        wide = (
            builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(builder, *wide, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


@pytest.fixture
def product_on_the_cpu(interpreted, monkeypatch):
    """torch has no half-precision product with a float32 result on the CPU."""
    from hiper_fast.kernels import _head

    def product(out, a, b, *, beta=0.0, alpha=1.0):
        result = alpha * (a.to(out.dtype) @ b.to(out.dtype))
        out.copy_(result + beta * out if beta else result)

    if interpreted:
        monkeypatch.setattr(_head, "product", product)
