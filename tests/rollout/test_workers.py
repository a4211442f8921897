"""Environments in processes of their own: what goes wrong there is named, ended, and replaced."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import wait

import pytest
from faulty import FAULTS, Family, Game, Options, Spawning

from hiper_fast.config import RolloutConfig
from hiper_fast.envs.household import Household
from hiper_fast.options import ConfigError
from hiper_fast.rollout import workers
from hiper_fast.rollout.workers import EnvironmentFailed, Worker, Zygote, open_workers

MEMORY_GB = 0.2
FAILURES = {
    "exit": ("crash", "step: its process ended with status 3"),
    "kill": ("crash", "step: its process was killed by SIGKILL, as the system does for want of"),
    "abort": ("crash", "step: its process was killed by SIGABRT"),
    "leave": ("crash", "step: its process ended with status 1"),
    "raise": ("error", r"step raises ZeroDivisionError: division by zero \(faulty.py:\d+\)"),
    "memory": ("memory", "its process has no memory left"),
    "hang": ("timeout", "step takes longer than 1 s"),
    "nothing": ("garbage", r"step must return \(observation, reward, terminated, truncated, info"),
    "lambda": ("garbage", "step returns .*lambda"),
    "unreadable": ("garbage", "step returns ValueError: invalid literal for int"),
    "number": ("garbage", "step's admissible_commands must be a list of str"),
}


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote(Family(Options(faults=list(FAULTS))).make, MEMORY_GB)
    yield zygote
    zygote.close()


@pytest.fixture
def worker(zygote):
    worker = Worker(zygote, timeout=20)
    yield worker
    worker.drop()


def call(worker, *args, **kwargs):
    worker.send(*args, **kwargs)
    return worker.receive()


def lose(worker, fault="exit"):
    """An episode that goes wrong; returns the failure."""
    call(worker, "reset", seed=4 * list(FAULTS).index(fault) + 1)
    with pytest.raises(EnvironmentFailed) as failure:
        call(worker, "step", "wait")
    return failure.value


def is_running(pid):
    """Whether there is such a process, be it a zombie."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_until_gone(pid, seconds=5.0):
    until = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_running(pid)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_its_process_ends_and_another_plays_on(worker, fault):
    call(worker, "reset", seed=0)
    worker.timeout, pid = 1 if fault == "hang" else 20, worker._pid
    failure = lose(worker, fault)
    cause, text = FAILURES[fault]
    assert failure.cause == cause
    with pytest.raises(EnvironmentFailed, match=text):
        raise failure
    assert not is_running(pid)
    worker.timeout = 20
    assert call(worker, "reset", seed=0)[0] == "begun"
    assert call(worker, "step", "win")[:3] == ("told win", 10.0, True)


def test_an_environment_that_cannot_be_made_is_named():
    broken = Zygote(partial(Game, unknown=1))
    with pytest.raises(EnvironmentFailed, match="make raises TypeError: .*unknown"):
        call(Worker(broken, timeout=20), "reset", seed=0)
    broken.close()


def test_what_cannot_be_sent_to_a_process_is_refused():
    with pytest.raises(ConfigError, match="rollout.workers: .* cannot be sent .*workers 0"):
        Zygote(lambda: Game())


def test_failures_in_a_row_make_a_worker_rest_longer_until_an_episode_is_whole(worker, monkeypatch):
    monkeypatch.setattr(workers, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(workers, "LONGEST_PAUSE", 0.04)

    def rest():
        lose(worker)
        return worker.ready_at - time.monotonic()

    rests = [rest() for _ in range(4)]
    assert rests == pytest.approx([0.01, 0.02, 0.04, 0.04], abs=0.005)
    call(worker, "reset", seed=0)
    call(worker, "step", "win")
    assert rest() == pytest.approx(0.01, abs=0.005)
    began = time.monotonic()
    call(worker, "reset", seed=0)
    assert time.monotonic() - began > 0.005


def test_a_game_is_the_same_in_a_worker():
    env = Household()
    zygote = Zygote(Household)
    worker = Worker(zygote, timeout=20)
    rng = random.Random(0)
    for seed in range(3):
        began = env.reset(seed=seed)
        assert call(worker, "reset", seed=seed) == began
        info = began[-1]
        for _ in range(5):
            command = rng.choice(info["admissible_commands"])
            stepped = env.step(command)
            assert call(worker, "step", command) == stepped
            info = stepped[-1]
    zygote.close()


def test_workers_answer_while_others_work(zygote):
    slow, quick = Worker(zygote, timeout=20), Worker(zygote, timeout=20)
    for worker, fault in ((slow, True), (quick, False)):
        call(worker, "reset", seed=4 * list(FAULTS).index("hang") + fault)
        worker.send("step", "win")
    assert wait([slow.connection, quick.connection], 10) == [quick.connection]
    assert quick.receive()[0] == "told win"
    slow.drop()
    quick.drop()
    assert slow.connection is quick.connection is None


def test_a_worker_says_whether_the_game_can_be_won(worker):
    told = []
    for seed in (0, 1, 2):
        call(worker, "reset", seed=seed)
        told.append(worker.reachable)
    assert told == [True, False, True]


def test_all_workers_end_with_the_block_and_so_does_what_they_began():
    options = RolloutConfig(workers=3, env_timeout=20)
    with open_workers(Spawning, options) as pool:
        began = [call(worker, "reset", seed=0)[0] for worker in pool]
        pids = [worker._pid for worker in pool] + [int(pid) for pid in began]
        assert all(map(is_running, pids)) and len(set(pids)) == 6
        pool[0].send("step", "hang")
        time.sleep(0.1)
    assert all(map(wait_until_gone, pids))
    with open_workers(Spawning, RolloutConfig()) as pool:
        assert pool == []


RUN = """
import sys, time
from faulty import Spawning
from hiper_fast.config import RolloutConfig
from hiper_fast.rollout.workers import open_workers
try:
    with open_workers(Spawning, RolloutConfig(workers=2, env_timeout=60)) as pool:
        for worker in pool:
            worker.send("reset", seed=0)
        print(*(worker.receive()[0] for worker in pool))
        print(*(worker._pid for worker in pool), flush=True)
        pool[0].send("step", "hang")
        time.sleep(60)
except KeyboardInterrupt:
    pass
"""


@contextlib.contextmanager
def other_run():
    """A process that has workers, one of them busy, and the pids of these and of what they began."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as run:
        pids = [int(pid) for _ in range(2) for pid in run.stdout.readline().split()]
        assert len(pids) == 4
        yield run, pids
        run.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_run_however_it_ends(number):
    with other_run() as (run, pids):
        run.send_signal(number)
        run.wait()
        assert all(map(wait_until_gone, pids))


def test_signals_that_ask_to_stop_are_for_the_run_alone(worker, zygote):
    call(worker, "reset", seed=0)
    for pid in (worker._pid, zygote.process.pid):
        assert os.getsid(pid) != os.getsid(0)  # where a terminal's Ctrl-C does not reach
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    assert call(worker, "step", "wait")[0] == "told wait"


def test_workers_do_without_their_zygote_by_beginning_another(worker, zygote):
    other = Worker(zygote, timeout=20)
    for one in (worker, other):
        call(one, "reset", seed=0)
    os.kill(zygote.process.pid, signal.SIGKILL)
    assert wait_until_gone(worker._pid) and wait_until_gone(other._pid)
    for one in (worker, other):
        with pytest.raises(EnvironmentFailed, match="its process ended, with that of all workers"):
            call(one, "step", "wait")
        assert call(one, "reset", seed=0)[0] == "begun"
    other.drop()
