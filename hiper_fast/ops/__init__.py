"""The fused ops, one file each; `reference` is their readable specification."""

from __future__ import annotations

import torch

from hiper_fast.ops import _library, reference
from hiper_fast.ops.find_roles import TokenPieces, find_roles
from hiper_fast.ops.gae import gae
from hiper_fast.ops.hae import HAE, hae
from hiper_fast.ops.linear_logprobs import linear_logprobs
from hiper_fast.ops.linear_ppo import linear_ppo
from hiper_fast.ops.normalize import normalize
from hiper_fast.ops.normalize_and_scatter import normalize_and_scatter
from hiper_fast.ops.paged_attention import paged_attention
from hiper_fast.ops.ppo_loss import ppo_loss
from hiper_fast.ops.rms_norm import rms_norm
from hiper_fast.ops.rope import rope
from hiper_fast.ops.sample import sample
from hiper_fast.ops.scatter_advantages import scatter_advantages
from hiper_fast.ops.swiglu import swiglu
from hiper_fast.ops.value_loss import value_loss

__all__ = [
    "HAE",
    "Implementation",
    "TokenPieces",
    "find_roles",
    "gae",
    "hae",
    "implementations",
    "linear_logprobs",
    "linear_ppo",
    "normalize",
    "normalize_and_scatter",
    "paged_attention",
    "ppo_loss",
    "reference",
    "rms_norm",
    "rope",
    "sample",
    "scatter_advantages",
    "swiglu",
    "value_loss",
]


class Implementation(str):
    """One of reference, cpp, triton; `why` is the reason where that is the slow one, else empty."""

    why: str

    def __new__(cls, name: str, why: str = "") -> Implementation:
        self = super().__new__(cls, name)
        self.why = why
        return self


def implementations() -> dict[str, dict[str, Implementation]]:
    """What would run here: op -> {"cpu": …, "cuda": …}, with "cuda" only where there is a GPU."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: _find_implementations(op, devices) for op in _OPS}


_OPS = (
    "hae", "gae", "normalize", "find_roles", "scatter_advantages", "normalize_and_scatter",
    "linear_logprobs", "ppo_loss", "value_loss", "linear_ppo",
    "paged_attention", "sample",
    "rms_norm", "rope", "swiglu",
)  # fmt: skip


def _find_implementations(op: str, devices: list[str]) -> dict[str, Implementation]:
    return {device: _find_implementation(op, device) for device in devices}


def _find_implementation(op: str, device: str) -> Implementation:
    no_triton = ""
    if device == "cuda":
        kernel, no_triton = _library.find_triton_kernel(op)
        if kernel is not None:
            return Implementation("triton")
        if _library.runs_on_cuda[op]:
            return Implementation("reference", f"torch operations; {no_triton}")
    if _library.extension is None:
        return Implementation("reference", _library.why_no_extension)
    return Implementation("cpp", no_triton and f"copied to the host and back; {no_triton}")
