"""What all ops share: the compiled extension, the namespace torch.ops.hiper_fast, the argument checks."""

from __future__ import annotations

import functools
import hashlib
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from hiper_fast.ops._numbers import check_above, check_divisor, is_readable

SOURCES = Path(__file__).parents[2] / "csrc"  # only in a checkout


def load_extension(sources: Path = SOURCES) -> tuple[ModuleType | None, str]:
    """The compiled kernels; or None, and why. Those of other sources than `sources` may take other arguments."""
    try:
        from hiper_fast import _C
    except ImportError as error:
        return None, (
            f"the C++ kernels cannot be loaded ({error}); install a C++17 compiler and run "
            "`pip install -e .` (or reinstall hiper_fast) to build them"
        )
    if sources.is_dir() and getattr(_C, "sources", "") != fingerprint(sources):
        return None, f"the C++ kernels are not built from {sources}; run `pip install -e .` again"
    return _C, ""


def fingerprint(sources: Path) -> str:
    """As CMakeLists.txt makes it."""
    files = sorted(file for file in sources.iterdir() if file.suffix in (".cpp", ".h"))
    hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


extension, why_no_extension = load_extension()
if extension is None:
    warnings.warn(f"hiper_fast runs on the slow torch reference: {why_no_extension}", stacklevel=2)

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)

kernel_modules: dict[str, str] = {}  # op -> the module of hiper_fast.kernels that has it
runs_on_cuda: dict[str, bool] = {}  # op -> what it falls back to is made of CUDA operations

_library = torch.library.Library("hiper_fast", "DEF")


def define(
    schema: str,
    *,
    check: Callable,
    plain: Callable,
    fake: Callable,
    cpp: Callable | None = None,
    cuda: bool = False,
    module: str = "",
) -> Callable:
    """Register one op: its schema, its kernels and its fake kernel. Returns the callable op.

    A call is checked, then dispatched as any op of torch: `check` takes its arguments and raises a
    ValueError where they do not fit. The op has no gradient of its own. On the CPU runs `cpp`, by
    default the extension's function of the op's name, or `plain` where there is no extension; on a
    GPU the function of the op's name in hiper_fast.kernels.<module, else the op's name>. Where that
    cannot be loaded, `plain` runs if it is made of `cuda` operations; else the tensors are copied
    to the host, and the result back.
    """
    name = schema.split("(", 1)[0]
    kernel_modules[name], runs_on_cuda[name] = module or name, cuda
    _library.define(schema)
    op = getattr(torch.ops.hiper_fast, name).default
    plain = torch.no_grad()(plain)
    otherwise = plain if cuda else _send_through_host(op)

    def run_cpp(*arguments):
        return getattr(extension, name)(torch.get_num_threads(), *map(make_plain, arguments))

    def run_on_gpu(*arguments):
        return (find_triton_kernel(name)[0] or otherwise)(*arguments)

    def run(*arguments):
        check(*arguments)
        return op(*arguments)

    _library.impl(name, plain if extension is None else cpp or run_cpp, "CPU")
    _library.impl(name, run_on_gpu, "CUDA")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"hiper_fast::{name}", fake, lib=_library)
    return run


@functools.cache
def find_triton_kernel(name: str) -> tuple[Callable | None, str]:
    """The op's function of hiper_fast.kernels, or None and the reason."""
    module = f"hiper_fast.kernels.{kernel_modules[name]}"
    try:
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError) as error:
        if getattr(error, "name", None) != module:  # there is one, but Triton has other names, say
            warnings.warn(
                f"ops.{name} runs without its Triton kernel, which cannot be loaded ({error}); "
                "is triton>=3.6,<4 installed?",
                stacklevel=2,
            )
        return None, f"there is no Triton kernel to load ({error})"


@functools.cache
def find_kernel(name: str, dtype: torch.dtype) -> Callable:
    """The C++ kernel of that name for that dtype."""
    return getattr(extension, f"{name}_{str(dtype).removeprefix('torch.')}")


def find_address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def make_plain(argument):
    """A tensor contiguous, half precision as float32: what kernels read. Anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    return (argument.float() if argument.dtype in HALVES else argument).contiguous()


def widen(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results and sums for inputs of `dtype`: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_denominator(denominator: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """What the op divides by (None: the number of loss tokens), and what its result is divided by
    after it: a tensor may lie on a GPU, and to read it would wait for all that is queued there."""
    if denominator is None:
        return None, None
    if isinstance(denominator, Tensor):
        check_divisor("denominator", denominator)
        return 1.0, denominator
    check_above("denominator", denominator, 0)
    return float(denominator), None


def divide(divisor: Tensor | None, *results: Tensor) -> tuple[Tensor, ...]:
    """NaN where a divisor that could not be read is not above 0."""
    if divisor is None:
        return results
    if not is_readable(divisor):
        divisor = torch.where(divisor > 0, divisor.to(results[0].dtype), torch.nan)
    return tuple(result / divisor for result in results)


def _send_through_host(op: Callable) -> Callable:
    def run_on_host(*arguments):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        result = op(
            *(
                argument.cpu() if isinstance(argument, Tensor) else argument
                for argument in arguments
            )
        )
        if isinstance(result, Tensor):
            return result.to(device)
        return tuple(tensor.to(device) for tensor in result)

    return run_on_host


def check_vector(
    name: str, tensor: Tensor, length: int | None, dtypes, device: torch.device | None
) -> None:
    """One dimension, `length` elements (None: any), one of `dtypes`, on `device` (None: any)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = tensor.shape
    if len(shape) != 1 or length is not None and length != shape[0]:
        wanted = "one dimension" if length is None else f"shape [{length}]"
        raise ValueError(f"{name} must have {wanted}, got shape {list(shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and device != tensor.device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def check_cu(name: str, cu: Tensor, device: torch.device | None) -> int:
    """int32, one dimension, at least one element; returns the number of segments. Not its values."""
    check_vector(name, cu, None, (torch.int32,), device)
    if cu.shape[0] == 0:
        raise ValueError(f"{name} must have at least one element, the leading 0")
    return cu.shape[0] - 1


def check_prefix_sum(name: str, cu: Tensor, total: int) -> None:
    """`cu` begins with 0, never falls and ends with `total`. The C++ kernels check the same."""
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {values[0]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(
                f"{name} must never fall, but falls from {values[i - 1]} to {values[i]} at index {i}"
            )
    if values[-1] != total:
        raise ValueError(f"{name} must end with {total}, got {values[-1]}")
