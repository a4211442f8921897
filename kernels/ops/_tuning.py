"""Constants of launches that were measured: benchmarks/tune.py writes them, by device, and the launches read them.

A table is a JSON file, {"NVIDIA H200, 9.0, Triton 3.6": {"swiglu._forward_kernel": {"BLOCK": 2048, "num_warps": 8}}},
of integers and switches; a power of two by default remains one. What a user has measured, in the cache folder for
this version of the package, goes before what comes with it, and without either the defaults beside the launches count.
Other constants sum in another order, so that results differ in their last bits from one table to the next, never from
run to run: HIPER_FAST_TUNED=0 in the environment leaves all tables unread.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from hiper_fast import __version__

Table = dict[str, dict[str, int | bool]]  # of one device: kernel -> parameter -> value

SHIPPED = Path(__file__).with_name("tuned.json")
READ = os.environ.get("HIPER_FAST_TUNED") != "0"

_tried: Table = {}


def cache_file() -> Path:
    """The user's own table."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "hiper_fast" / f"tuned-{__version__}.json"


def describe_device(device: torch.device) -> str:
    """The table's key for a GPU: a table of another Triton, which may take more of a processor, is not read."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    release = ".".join(triton.__version__.split(".")[:2])
    return f"{torch.cuda.get_device_name(device)}, {capability}, Triton {release}"


def read_table(path: Path, device: str) -> Table:
    """The device's part of a file; ValueError if the file is no table."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict) or not _is_table(content.get(device, {})):
        raise ValueError(f"{path} holds no table of kernels' constants")
    return content.get(device, {})


@functools.cache
def constants(kernel: str, device: torch.device, **defaults: int) -> dict[str, int]:
    """`defaults`, and in their places what was measured on the device; not to be changed by the caller.

    Args:
        kernel: module and function, as tests/gpu/builds.py names it, and in what case where that matters.
    """
    found = _tried[kernel] if kernel in _tried else _measured(device).get(kernel, {})
    known = {name: value for name, value in found.items() if name in defaults}
    odd = {name: value for name, value in known.items() if not _is_like(value, defaults[name])}
    if odd:
        warnings.warn(f"{kernel}: {odd} cannot be; {defaults} are used", stacklevel=2)
        return defaults
    return defaults | known


@contextlib.contextmanager
def trying(kernel: str, **values: int) -> Iterator[None]:
    """Within, launches of the kernel have these constants, whatever was measured; an empty call: the defaults."""
    _tried[kernel] = values
    constants.cache_clear()
    try:
        yield
    finally:
        del _tried[kernel]
        constants.cache_clear()


@functools.cache
def _measured(device: torch.device) -> Table:
    if device.type != "cuda" or not READ:
        return {}
    name, found = describe_device(device), {}
    for path in (SHIPPED, cache_file()):
        try:
            found |= read_table(path, name)
        except ValueError as error:
            warnings.warn(f"{error}: the kernels' defaults are used instead", stacklevel=2)
    return found


def _is_table(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(kernel, dict) and all(isinstance(value, int) for value in kernel.values())
        for kernel in content.values()
    )


def _is_like(value: int | bool, default: int | bool) -> bool:
    """A switch where the default is one; else above 0, and a power of two where the default is."""
    if type(value) is not type(default) or isinstance(default, bool):
        return type(value) is type(default)
    return value > 0 and (value & (value - 1) == 0 or default & (default - 1) != 0)
