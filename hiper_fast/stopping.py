"""Signals that ask a run to stop: SIGINT (Ctrl-C), SIGTERM and SIGHUP. Once for a stop in order, again for one at once.

Only of the standard library, so that a signal is heard while the others are still imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
PAUSE = (
    1.0  # seconds in which it is still the same request: `timeout` and shells send a signal twice
)
STATUS = 128  # an exit status of a signal is this and its number

Handler = Callable[[int, "FrameType | None"], None]


class Stop(KeyboardInterrupt):
    """The run ends here because a signal asked for it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stopping:
    """Within, a signal sets `asked`, to be looked at where a run can end; in `at_once` it raises Stop.

    One that comes again ends the process there and then. Outside the main thread signals are left as they are.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self._since = 0.0
        self._at_once = False
        self._process = os.getpid()
        self._former: dict[int, Handler] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._former = _listen(self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Within, if allowed, the first signal raises Stop: what is done here can be thrown away."""
        self._at_once = allowed
        try:
            if allowed and self.asked:
                raise Stop(self.asked)
            yield
        finally:
            self._at_once = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked: it has nothing to finish
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.asked:
            self.asked, self._since = number, time.monotonic()
            if self._at_once:
                raise Stop(number)
            if speaks():
                say(f"{name(number)}: stopping when this update is saved; once more stops at once")
        elif time.monotonic() - self._since > PAUSE:
            _end(number, "stopped at once; what was saved is whole")


def catch_early() -> None:
    """Has a signal end this process with one line, until a run listens: while the libraries are imported."""
    _listen(lambda number, frame: _end(number, f"stopped ({name(number)}); nothing was under way"))


def name(number: int) -> str:
    return signal.Signals(number).name


def speaks() -> bool:
    """Whether this is the process that tells, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """To stderr past its buffer, which the interrupted code may be writing to."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _listen(handler: Handler) -> dict[int, Handler]:
    """Gives the signals a handler, but for those that are ignored, as `nohup` has it; returns the former ones."""
    heard = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


def _end(number: int, text: str) -> None:
    if speaks():
        say(text)
    os._exit(STATUS + number)
