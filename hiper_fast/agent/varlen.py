"""Kernels for causal attention over packed sequences: flash-attn's where it is installed, else torch's.

Each is called as kernel(query, key, value, cu, longest, scale, window), flash-attn's also with softcap, and
gives [tokens, heads, d]. query [tokens, heads, d], key and value [keys, kv_heads, d] with kv_heads dividing heads,
all bfloat16 or float16 on a GPU; cu: int32 [sequences + 1] of queries and of keys; longest: sequence of either; the
last query of a sequence stands at its last key; window: None, or how many tokens a token sees, itself among them.
Where torch is asked for deterministic algorithms both sum gradients in a fixed order, at a price: flash-attn is told
here, torch sees to its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
MULTIPLE = 8  # of which torch's kernel wants d to be
AMPERE = 8  # compute capability from which on there are kernels
MISSING = "flash_attn is not installed (pip install 'hiper-fast[flash]')"


class Choice(NamedTuple):
    """What a packed call attends by."""

    name: str
    why: str  # nothing faster does; empty where nothing is
    kernel: Callable | None  # None: torch's operations do

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" if self.why else self.name


def choose(query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> Choice:
    """For query [tokens, heads, d] and value [tokens, kv_heads, d_v]."""
    largest = max(query.shape[-1], value.shape[-1])
    return choose_kernel(
        query.device.type, query.dtype, largest, softcap is not None, sinks is not None
    )


@functools.cache
def choose_kernel(
    device: str, dtype: torch.dtype, head_size: int, capped: bool = False, sinks: bool = False
) -> Choice:
    """For calls of a kind; `capped`: of soft-capped scores, `sinks`: with attention sinks."""
    plain = "written-out scores" if capped or sinks else "scaled_dot_product_attention"
    if obstacle := find_obstacle(device, dtype, head_size, sinks):
        return Choice(plain, obstacle, None)
    kernel, no_flash = find_flash()
    if kernel:
        return Choice("flash_attn", "", kernel)
    if capped:
        return Choice(plain, f"torch's kernel caps no scores, and {no_flash}", None)
    kernel, no_varlen = find_varlen()
    if kernel:
        return Choice("torch's varlen_attn", no_flash, kernel)
    return Choice(plain, f"{no_varlen}, and {no_flash}", None)


def find_obstacle(device: str, dtype: torch.dtype, head_size: int, sinks: bool) -> str:
    """Why no kernel can; empty if one may."""
    if device != "cuda":
        return "kernels for packed sequences are a GPU's"
    if dtype not in HALF:
        return f"kernels for packed sequences take half precision, not {str(dtype).removeprefix('torch.')}"
    if head_size > LARGEST_HEAD:
        return f"heads of {head_size} are larger than {LARGEST_HEAD}"
    if sinks:
        return "kernels for packed sequences have no attention sinks"
    if torch.cuda.get_device_capability()[0] < AMPERE:
        return "the GPU is older than Ampere"
    return ""


def find_flash() -> tuple[Callable | None, str]:
    """flash-attn's; or None, and why."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return None, MISSING if missing else f"flash_attn cannot be loaded ({error})"

    def flash(query, key, value, cu, longest, scale, window, softcap=0.0):
        reach = (window - 1, 0) if window else (-1, -1)
        return flash_attn_varlen_func(
            query, key, value, *cu, *longest, softmax_scale=scale, causal=True,
            window_size=reach, softcap=softcap, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return flash, ""


def find_varlen() -> tuple[Callable | None, str]:
    """torch's; or None, and why."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known:
        return None, "torch's varlen_attn has neither scale nor window before torch 2.11"
    # Where it does not ask for this, its kernel shares heads of keys unasked.
    options = {"enable_gqa": True} if "enable_gqa" in known else {}

    def varlen(query, key, value, cu, longest, scale, window):
        reach = (window - 1 if window else -1, 0)
        return varlen_attn(
            query, key, value, *cu, *longest, scale=scale, window_size=reach, **options
        )

    return varlen, ""


def call(kernel: Callable, query: Tensor, key: Tensor, value: Tensor, *rest, **options) -> Tensor:
    """What `kernel` gives [tokens, heads, d_v], also for d and d_v that differ or that it does not take."""
    largest = max(query.shape[-1], value.shape[-1])
    size = -(-largest // MULTIPLE) * MULTIPLE
    states = (
        x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (query, key, value)
    )
    return kernel(*states, *rest, **options)[..., : value.shape[-1]]
