"""Environments in processes of their own, with limits of time and memory: what one does there costs its episode alone.

A zygote, a process that never saw a model, loads the family's module and data once and forks into workers: each begins
in milliseconds, and all share that memory. Forking the run itself is no way: it has threads, and maybe a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NoReturn

from hiper_fast.config import RolloutConfig
from hiper_fast.envs.base import Environment, ProtocolError, check_reset, check_step
from hiper_fast.options import ConfigError
from hiper_fast.text import PlainError

Make = Callable[[], Environment]
Cause = Literal["crash", "error", "garbage", "memory", "timeout"]

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds between a failure and the next process
LOADING = 600.0  # seconds in which a zygote must have loaded the family's data
GRACE = 1.0  # seconds that a worker has to end by itself
BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); " + (
    "from hiper_fast.rollout import workers; workers.serve(int(sys.argv[2]))"
)
ORDER = struct.Struct("!qd")  # a worker's pid, and its seconds of grace; 0: fork one
REPLY = struct.Struct("!q")  # a pid, or how the process ended, as of `os.waitpid`
UNKNOWN = -1  # in its place, of a former zygote's worker
IGNORED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # the run decides
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
GIB = 2**30
OUT_OF_MEMORY = pickle.dumps(("memory", "its process has no memory left", True))  # made in time


class EnvironmentFailed(PlainError):
    """An environment did not do what was asked of it; its episode is lost."""

    def __init__(self, cause: Cause, text: str):
        super().__init__(text)
        self.cause = cause


class Worker:
    """One environment, an episode after the other, in a process that is replaced when it fails.

    `send` a call; when `connection` is readable (`multiprocessing.connection.wait`) or `deadline` past, `receive`.
    """

    def __init__(self, zygote: Zygote, timeout: float):
        self.zygote, self.timeout = zygote, timeout
        self.connection: Connection | None = None  # None: no process, until the next call
        self.deadline = math.inf  # by time.monotonic(), of the answer
        self.ready_at = -math.inf  # by time.monotonic(): rests until then after a failure
        self.reachable = True  # whether the best score of the present game can be had at all
        self._pid = 0
        self._call = ""
        self._failures = 0  # in a row, without a whole episode between them

    def send(self, call: Literal["reset", "step"], *args: Any, **kwargs: Any) -> None:
        """Calls the environment's method; one call at a time. A worker that rests first sleeps until `ready_at`."""
        if self.connection is None:
            self._start()
        elif call == "reset":  # it outlived an episode
            self._failures = 0
        self._call, self.deadline = call, time.monotonic() + self.timeout
        with contextlib.suppress(ConnectionError):  # it is dead, as `receive` will find
            self.connection.send((call, args, kwargs))

    def receive(self) -> Any:
        """What the call returned, checked. EnvironmentFailed if it failed, at the latest at `deadline`."""
        try:
            if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                self._fail("timeout", f"{self._call} takes longer than {self.timeout:g} s", grace=0)
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            self._fail("crash")
        try:
            cause, said, self.reachable = pickle.loads(message)
        except Exception as error:  # whatever is raised by the classes of what was sent
            self._fail("garbage", f"{self._call} returns {describe(error)}", grace=0)
        if cause is not None:
            self._fail(cause, said, grace=0)
        return said

    def drop(self) -> None:
        """Gives up an episode in whatever state; no failure of the environment's."""
        if self.connection is not None:
            self._end(grace=0)

    def close(self) -> None:
        """Lets the environment end by itself; its process is gone when the zygote is closed."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _start(self) -> None:
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        self.connection, theirs = Pipe()
        with theirs, contextlib.suppress(OSError):  # as `receive` will find
            self._pid = self.zygote.fork(theirs)

    def _end(self, grace: float) -> str:
        """Leaves no process; says how it ended."""
        self.connection.close()
        pid, self._pid, self.connection, self.deadline = self._pid, 0, None, math.inf
        return self.zygote.end(pid, grace)

    def _fail(self, cause: Cause, text: str = "", *, grace: float = GRACE) -> NoReturn:
        ended = self._end(grace)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures += 1
        self.ready_at = time.monotonic() + pause
        raise EnvironmentFailed(cause, text or f"{self._call}: {ended}")


class Zygote:
    """The process that workers are forked from; begun when it is needed, and again when it died."""

    def __init__(self, make: Make, memory_gb: float = 0.0):
        """make: a picklable function, as a family's `make`. memory_gb: GiB of data a worker may have; 0: any."""
        try:
            self.make = pickle.dumps((make, memory_gb))
        except Exception as error:  # whatever an attribute raises
            raise ConfigError(
                f"rollout.workers: the environment's family cannot be sent to a process ({describe(error)}); make it "
                "picklable, or play here: --rollout.workers 0"
            ) from error
        self.process: subprocess.Popen | None = None
        self.control: socket.socket | None = None

    def fork(self, connection: Connection) -> int:
        """The pid of a new worker at the other end of `connection`. OSError if there is none in `LOADING` seconds."""
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it died
        if self.process is None:
            self._begin()
        return self._ask(ORDER.pack(0, 0.0), [connection.fileno()])

    def end(self, pid: int, grace: float) -> str:
        """Ends a worker, killed after `grace` seconds with all that it began; says how it ended."""
        if not pid:
            return "no process can be started"
        status = None
        with contextlib.suppress(OSError):
            status = self._ask(ORDER.pack(pid, grace)) if self.process else None
        if status in (None, UNKNOWN):  # no worker outlives its zygote
            return "its process ended, with that of all workers"
        return describe_end(status)

    def close(self) -> None:
        """Ends all workers: a moment is theirs, then they are killed."""
        if self.process is None:
            return
        self.control.close()
        try:
            self.process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:  # it is loading
            self.process.kill()
            self.process.wait()
        self.process = self.control = None

    def _begin(self) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(LOADING)
        command = [sys.executable, "-u", "-c", BEGIN, json.dumps(sys.path), str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is not for them
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(self.make)

    def _ask(self, order: bytes, fds: list[int] = ()) -> int:
        """The reply. OSError if none comes; then it is no more."""
        # Not OSError alone: after an interrupt the reply would be taken for that of the next order.
        try:
            socket.send_fds(self.control, [order], fds)
            reply = self.control.recv(REPLY.size)
            if not reply:
                raise ConnectionResetError("the zygote ended")
        except BaseException:
            self.close()
            raise
        return REPLY.unpack(reply)[0]


@contextlib.contextmanager
def open_workers(make: Make, options: RolloutConfig) -> Iterator[list[Worker]]:
    """`rollout.workers` of them, within; each has one environment of `make`."""
    if options.workers and not hasattr(os, "fork"):
        raise ConfigError("rollout.workers: this system has no fork; use 0")
    zygote = Zygote(make, options.env_memory_gb)
    workers = [Worker(zygote, options.env_timeout) for _ in range(options.workers)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()
        zygote.close()


def call_checked(env: Environment, call: str, *args: Any, **kwargs: Any) -> Any:
    """What `reset` or `step` returns, as promised; EnvironmentFailed, of cause error or garbage, otherwise."""
    result = perform(call, getattr(env, call), *args, **kwargs)
    try:
        return {"reset": check_reset, "step": check_step}[call](env, result)
    except ProtocolError as error:
        raise EnvironmentFailed("garbage", str(error)) from None
    except Exception as error:  # whatever cannot even be compared
        raise EnvironmentFailed("garbage", f"{call} returns {describe(error)}") from error


def perform(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the environment's `function` returns; EnvironmentFailed, of cause error, for what it raises."""
    try:
        return function(*args, **kwargs)
    except MemoryError:
        raise
    except Exception as error:
        raise EnvironmentFailed("error", f"{name} raises {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Its type, message and place, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def describe_end(status: int) -> str:
    """How a process ended, of its wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"its process ended with status {code}"
    hint = ", as the system does for want of memory" if code == -signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-code).name}{hint}"


# What follows runs in the zygote and its workers.


def serve(control: int) -> NoReturn:
    """The zygote: forks and ends workers as asked, until the run is gone."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    make = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    with contextlib.suppress(Exception):  # which a worker will raise and report
        close(pickle.loads(make)[0]())
    gc.collect()
    gc.freeze()  # a collection writes to every object that it looks at, and would copy its page
    pids: set[int] = set()
    with socket.socket(fileno=control) as channel:
        while True:
            order, fds, _, _ = socket.recv_fds(channel, ORDER.size, 1)
            if not order:
                break
            pid, grace = ORDER.unpack(order)
            reply = UNKNOWN
            if fds:
                reply = fork(fds[0], channel, make)
                pids.add(reply)
            elif pid in pids:
                reply = end(pid, time.monotonic() + grace)
                pids.remove(pid)
            channel.send(REPLY.pack(reply))
    until = time.monotonic() + GRACE
    for pid in pids:
        end(pid, until)
    os._exit(0)


def fork(fd: int, channel: socket.socket, make: bytes) -> int:
    """A worker's pid; the worker itself never returns."""
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        channel.close()
        os.set_inheritable(fd, False)
        os.setsid()  # whatever it begins is ended with it
        die_with(zygote)
        work(Connection(fd), make)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    finally:
        os._exit(1)


def end(pid: int, until: float) -> int:
    """The wait status of a worker that has until then to end by itself."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(pid, signal.SIGKILL)
    return status if ended else os.waitpid(pid, 0)[1]


def die_with(parent: int) -> None:
    """Has the system kill this process when its parent is gone, where it can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def work(connection: Connection, make: bytes) -> NoReturn:
    """Answers calls until the run closes the connection."""
    make, memory_gb = pickle.loads(make)
    limit_memory(memory_gb)
    env = None
    while True:
        try:
            call, args, kwargs = connection.recv()
        except (EOFError, ConnectionError):
            break
        message = OUT_OF_MEMORY
        try:
            env = perform("make", make) if env is None else env
            message = answer(env, call, args, kwargs)
        except EnvironmentFailed as failure:
            message = pickle.dumps((failure.cause, str(failure), True))
        except MemoryError:  # what fills it goes with the exception, or with the environment
            env = None
        connection.send_bytes(message)
    close(env)
    os._exit(0)


def limit_memory(gb: float) -> None:
    if gb:
        import resource  # not on every system

        resource.setrlimit(resource.RLIMIT_DATA, (int(gb * GIB), int(gb * GIB)))


def answer(env: Environment, call: str, args: tuple, kwargs: dict[str, Any]) -> bytes:
    """A pickled (None: no failure, result, reachable)."""
    result = call_checked(env, call, *args, **kwargs)
    try:
        return pickle.dumps((None, result, getattr(env, "reachable", True)))
    except MemoryError:
        raise
    except Exception as error:  # whatever it takes not to be pickled
        raise EnvironmentFailed("garbage", f"{call} returns {describe(error)}") from error


def close(env: Environment | None) -> None:
    """An environment may have a `close`, as Gymnasium's have."""
    with contextlib.suppress(Exception):
        getattr(env, "close", bool)()
