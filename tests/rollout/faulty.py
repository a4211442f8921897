"""`--env faulty:Family`: games some of which bring down what they run in, to see what a run makes of it."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass

from hiper_fast.config import EnvConfig
from hiper_fast.envs.family import Family as EnvFamily
from hiper_fast.options import option

WON = {"admissible_commands": [], "won": True, "task": "win", "task_type": "plain"}


class Untransportable:
    """Can be sent, but not received."""

    def __reduce__(self):
        return int, ("no number",)


def fill_memory():
    kept = []
    while True:
        kept.append(bytearray(2**20))


FAULTS = {
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "leave": lambda: exit("bye"),
    "raise": lambda: 1 / 0,
    "memory": fill_memory,
    "hang": lambda: time.sleep(3600),
    "nothing": lambda: None,
    "lambda": lambda: ("seen", 0.0, False, False, WON | {"more": lambda: 0}),
    "unreadable": lambda: ("seen", 0.0, False, False, WON | {"more": Untransportable()}),
    "number": lambda: ("seen", 0.0, False, False, WON | {"admissible_commands": [7]}),
}  # fmt: skip


@dataclass(slots=True)
class Options(EnvConfig):
    faults: list[str] = option(["exit"], f"some of {', '.join(FAULTS)}: what goes wrong, in turn")
    every: int = option(4, "one game in so many goes wrong: those whose seed leaves 1", above=1)
    at: int = option(1, "the turn at which it does; 0: when the game begins", least=0)


class Game:
    """Won by "win". Game `seed` has the fault `faults[seed // every % len(faults)]`."""

    def __init__(self, faults=(), every=4, at=1):
        self.faults, self.every, self.at = faults, every, at

    def reset(self, *, seed=None, options=None):
        self.turn, self.fault = 0, None
        if self.faults and seed % self.every == 1:
            self.fault = FAULTS[self.faults[seed // self.every % len(self.faults)]]
        self.reachable = self.fault is None
        return self.fault() if self.fault and not self.at else ("begun", self.look(False))

    def step(self, command):
        self.turn += 1
        if self.fault and self.turn == self.at:
            return self.fault()
        won = command == "win"
        return f"told {command}", 10.0 * won, won, False, self.look(won)

    def look(self, won):
        return WON | {"won": won, "admissible_commands": ["win", "wait"]}


class Spawning(Game):
    """Has a process of its own, which it says the number of."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.own = subprocess.Popen(["sleep", "60"])
        return str(self.own.pid), info

    def step(self, command):
        time.sleep(60)

    def close(self):
        self.own.kill()
        self.own.wait()


class Family(EnvFamily):
    Options = Options
    environment = Game

    def list_words(self):
        return EnvFamily.list_words(Family(Options(faults=[])))
