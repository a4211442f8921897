"""The launches that benchmarks/tune.py tunes give the reference's results, with the constants that it would try."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hiper_fast.kernels import _head, _tuning

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tune import check, list_candidates
from tune_cases import CASES

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def product_on_the_cpu(interpreted, monkeypatch):
    """torch has no half-precision product with a float32 result on the CPU."""

    def product(out, a, b, *, beta=0.0, alpha=1.0):
        result = alpha * (a.to(out.dtype) @ b.to(out.dtype))
        out.copy_(result + beta * out if beta else result)

    if interpreted:
        monkeypatch.setattr(_head, "product", product)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
@pytest.mark.parametrize("which", [0, -1], ids=["defaults", "others"])
def test_a_candidate_is_right(device, interpreted, case, which):
    values = list(list_candidates(case))[which]
    with _tuning.trying(case.kernel, **values):
        check(case, device, torch.float16 if interpreted else torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_the_first_candidate_is_the_default(device, interpreted, case, monkeypatch):
    asked = {}
    constants = _tuning.constants

    def note(kernel, device, **defaults):
        asked.setdefault(kernel, defaults)
        return constants(kernel, device, **defaults)

    for name, module in list(sys.modules.items()):
        if name.startswith("hiper_fast.kernels.") and hasattr(module, "constants"):
            monkeypatch.setattr(module, "constants", note)
    case.prepare(True, device, torch.float16 if interpreted else torch.bfloat16).call()
    first = next(list_candidates(case))
    assert first.items() <= asked[case.kernel].items()
