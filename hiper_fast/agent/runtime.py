"""How this process computes: threads, denormals, memory that stays with it, and what makes it slow."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from transformers.utils import logging

from hiper_fast.agent.agent import Agent
from hiper_fast.config import RunConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def configure_torch(config: RunConfig) -> None:
    """Threads, and denormals as zero: small models' gradients are full of them, and slow."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def describe_computing(agent: Agent) -> list[str]:
    """What a run on a GPU is told of its speed: by what its updates attend, and that float32 is slow. Of a tiny model's
    precision nothing: there launches take the time. All processes call this together."""
    if agent.device.type != "cuda":
        return []
    lines = [f"attention: {choice}" for choice in agent.find_attention()]
    exact = torch.get_float32_matmul_precision() == "highest"  # no TF32
    if agent.config.dtype == "float32" and exact and not agent.tiny:
        lines.append(
            "warning: model.dtype is float32, whose products leave the GPU's tensor cores idle; "
            "--model.dtype bfloat16 is several times as fast"
        )
    return lines


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Neither its bars nor its warnings, until the block is left; what they tell of must be checked there."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else each pass gets its memory anew, page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
