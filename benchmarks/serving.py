"""Environment steps: in process, and through an OpenEnv server by its own client, one session and many.

How many a second, and what each costs of CPU time, which other work on the machine changes less. Linux.

python benchmarks/serving.py                        # starts python -m hiper_fast.serve household itself
python benchmarks/serving.py alfworld --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from openenv.core import GenericEnvClient

from hiper_fast import envs

TURNS = 50  # after which an episode is left
SERVER = "-m", "hiper_fast.serve"


def read_cpu(pid: int | str = "self") -> float:
    """Seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def play_here(name: str, seconds: float) -> tuple[int, float]:
    """Steps, and the seconds they took."""
    env, rng, steps = envs.make(name), random.Random(0), 0
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        _, info = env.reset(seed=steps)
        for _ in range(TURNS):
            *_, info = env.step(rng.choice(info["admissible_commands"]))
        steps += TURNS
    return steps, time.perf_counter() - begun


async def play_session(client: GenericEnvClient, number: int, end: float) -> int:
    rng, steps = random.Random(number), 0
    while time.perf_counter() < end:
        result = await client.reset(seed=steps + number)
        for _ in range(TURNS):
            commands = result.observation["admissible_commands"]
            result = await client.step({"command": rng.choice(commands)})
        steps += TURNS
    return steps


async def play_there(url: str, sessions: int, seconds: float) -> tuple[int, float]:
    """Steps of all sessions, and the seconds they took."""
    clients = [GenericEnvClient(url) for _ in range(sessions)]
    for client in clients:
        await client.connect()
    begun = time.perf_counter()
    end = begun + seconds
    plays = [play_session(client, number, end) for number, client in enumerate(clients)]
    steps = sum(await asyncio.gather(*plays))
    taken = time.perf_counter() - begun
    for client in clients:
        await client.close()
    return steps, taken


def tell(what: str, steps: int, seconds: float, **cpu: float) -> None:
    costs = ", ".join(f"{who} {1e6 * spent / steps:.0f} µs" for who, spent in cpu.items())
    print(f"{what}: {steps / seconds:,.0f} steps/s; CPU time of a step: {costs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", nargs="?", default="household")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    before = read_cpu()
    played = play_here(arguments.env, arguments.seconds)
    tell("in process", *played, here=read_cpu() - before)
    command = [sys.executable, *SERVER, arguments.env, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[2].rstrip(";")
            for sessions in (1, 64):
                client, behind = read_cpu(), read_cpu(server.pid)
                played = asyncio.run(play_there(url, sessions, arguments.seconds))
                cpu = {"server": read_cpu(server.pid) - behind, "client": read_cpu() - client}
                tell(f"sessions {sessions}", *played, **cpu)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
