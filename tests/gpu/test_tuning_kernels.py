"""The launches that benchmarks/tune.py tunes give the reference's results, with the constants that it would try."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hiper_fast.kernels import _tuning

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tune import check, list_candidates
from tune_cases import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("product_on_the_cpu")]


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
