"""Where the kernels come from, and that they cost nothing where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code, cwd=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_the_kernels_are_a_part_of_the_package():
    pytest.importorskip("triton")
    done = python("import hiper_fast.kernels.hae as m; print(m.__file__)", cwd="/")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "hae.py"


def test_importing_and_using_the_ops_on_the_cpu_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules
from hiper_fast import ops
ops.normalize(torch.ones(2), torch.ones(2).bool()), ops.implementations()
assert before or "triton" not in sys.modules
"""
    assert python(code).returncode == 0


def test_a_kernel_that_cannot_be_loaded_is_told(monkeypatch):
    from hiper_fast.ops import _library

    def renamed(module):
        raise AttributeError("module 'triton.language' has no attribute 'load'")

    monkeypatch.setattr(_library.importlib, "import_module", renamed)
    with pytest.warns(UserWarning, match="ops.hae runs without its Triton kernel.*'load'"):
        kernel, why = _library.find_triton_kernel.__wrapped__("hae")
    assert kernel is None and "'load'" in why


def test_an_op_without_a_triton_kernel_is_not_worth_a_warning(monkeypatch, recwarn):
    from hiper_fast.ops import _library

    monkeypatch.setitem(_library.kernel_modules, "hae", "not_written")
    assert _library.find_triton_kernel.__wrapped__("hae")[0] is None and not recwarn.list


def test_the_checkout_shadows_no_package_named_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.theirs"
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
