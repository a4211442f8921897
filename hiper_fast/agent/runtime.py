"""How this process computes: threads, denormals, and memory that stays with it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from transformers.utils import logging

from hiper_fast.config import RunConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def configure_torch(config: RunConfig) -> None:
    """Threads, and denormals as zero: small models' gradients are full of them, and slow."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


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
