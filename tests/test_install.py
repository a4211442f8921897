"""The package as installed: the public names and signatures, and how it runs without its extension."""

import inspect
import subprocess
import sys

import hiper_fast
from hiper_fast import ops

CONTRACT = {
    "hae": "rewards values_low values_high switch terminated cu_turns * values_switch=None "
    "bootstrap_low=None bootstrap_high=None gamma=1.0 lambda_turn=1.0 lambda_segment=0.95",
    "normalize": "values mask eps=1e-08 * group=None",
    "gae": "rewards values terminated cu_turns * bootstrap=None gamma=1.0 lambda_=1.0",
    "find_roles": "token_ids cu_tokens pieces",
    "scatter_advantages": "hae roles cu_tokens",
    "normalize_and_scatter": "hae roles cu_tokens eps=1e-08",
    "linear_logprobs": "hidden weight targets * temperature=1.0 bias=None softcap=None entropy=False",
    "ppo_loss": "logprobs old_logprobs advantages loss_mask * ref_logprobs=None entropy=None clip_low=0.2 "
    "clip_high=0.2 dual_clip=3.0 kl_coef=0.01 entropy_coef=0.001 denominator=None",
    "value_loss": "values old_values returns mask * clip=0.5 denominator=None",
    "linear_ppo": "hidden weight targets old_logprobs advantages * ref_logprobs=None temperature=1.0 "
    "bias=None softcap=None clip_low=0.2 clip_high=0.2 dual_clip=3.0 kl_coef=0.01 entropy_coef=0.001 "
    "denominator=None",
    "paged_attention": "query keys values blocks cu_query lengths * scale=None window=None softcap=None sinks=None",
    "sample": "logits uniform temperature",
    "rms_norm": "x weight eps=1e-06",
    "swiglu": "gate up",
    "rope": "query key cos sin",
    "implementations": "",
}


def spell(function):
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        words.append(parameter.name + default)
    return " ".join(words)


def test_signatures():
    assert {name: spell(getattr(ops, name)) for name in CONTRACT} == CONTRACT


def test_each_op_has_a_reference_and_an_implementation():
    names = set(CONTRACT) - {"implementations"}
    assert set(ops.implementations()) == names
    assert all(callable(getattr(ops.reference, name)) for name in names)
    for devices in ops.implementations().values():
        for implementation in devices.values():
            assert implementation in ("reference", "cpp", "triton")
            assert implementation != "reference" or implementation.why


def test_the_extension_was_built():
    """A missing compiler is allowed to users, but not to those who test the kernels."""
    assert ops.implementations()["hae"]["cpu"] == "cpp", ops.implementations()["hae"]["cpu"].why


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["hiper_fast._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from hiper_fast import ops
    import hiper_fast.ops
    ours = [w for w in caught if "hiper_fast" in str(w.message)]
assert len(ours) == 1 and "compiler" in str(ours[0].message), [str(w.message) for w in caught]
implementation = ops.implementations()["hae"]["cpu"]
assert implementation == "reference" and "compiler" in implementation.why

import torch
one = torch.tensor
cu = one([0, 2, 3], dtype=torch.int32)
pieces = ops.TokenPieces.from_bytes([b"<action>", b"y", b"</action>"])
roles, switch, value_index, valid = ops.find_roles(one([0, 2, 1]), cu, pieces)
assert roles.tolist() == [1, 1, 1]
zeros, two = one([0.0, 0.0]), one([0, 2], dtype=torch.int32)
hae = ops.hae(one([1.0, 2.0]), zeros, zeros, switch, one([True]), two)
assert hae.advantages_low.tolist() == [3.0, 2.0]
assert ops.scatter_advantages(hae, roles, cu)[0].tolist() == [3.0, 3.0, 2.0]
assert ops.gae(one([1.0]), one([0.5]), one([True]), one([0, 1], dtype=torch.int32))[0].tolist() == [0.5]
assert ops.normalize(one([1.0, 3.0]), one([True, True])).tolist() == [-1.0, 1.0]
for bad in ([0, 2, 3], [0, 2]):
    try:
        ops.find_roles(one(bad), cu, pieces)
    except ValueError as error:
        assert "token_ids" in str(error) or "cu_tokens" in str(error)
    else:
        raise AssertionError("no error")
"""


def test_without_the_extension_the_reference_runs_and_one_warning_tells_why():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    code = "import sys, hiper_fast; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert hiper_fast.__version__
