"""A folder for one process alone: a lock of the operating system, and its owner's name in the file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hiper_fast.options import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path, kind: str, mend: str) -> Iterator[None]:
    """The folder, for this process alone until it ends. ConfigError names whoever has it, a `kind`, and the `mend`.

    The system gives the lock back when its owner dies, however it does. Where a file system has no such locks the
    owner's name decides: one that is dead, on this host, is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    with file.open("a+", encoding="utf-8", errors="replace") as lock:
        if not _take(lock):
            raise ConfigError(
                f"{folder}: another {kind} is at work here ({_tell(lock, file)}); {mend}"
            )
        lock.truncate(0)
        lock.write(json.dumps(_describe_me()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def _take(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not _is_alive(_read_owner(lock))
    return True


def _describe_me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _read_owner(lock: TextIO) -> dict[str, Any]:
    lock.seek(0)
    with contextlib.suppress(ValueError):
        owner = json.loads(lock.read())
        if isinstance(owner, dict):
            return owner
    return {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """As far as can be known: of another host's process nothing can."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["process"]), 0)
    except (ProcessLookupError, KeyError, ValueError, TypeError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _tell(lock: TextIO, file: Path) -> str:
    owner = _read_owner(lock)
    if not owner:
        return f"its name is not in {file}"
    told = ", ".join(f"{key} {value}" for key, value in owner.items())
    elsewhere = owner.get("host") != socket.gethostname()
    return told + (f"; if that is gone, remove {file}" if elsewhere else "")
