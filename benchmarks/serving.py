"""Environment steps a second: in process, and through an OpenEnv server by its own client, one session and many.

python benchmarks/serving.py                        # starts python -m hiper_fast.serve household itself
python benchmarks/serving.py alfworld --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time

from openenv.core import GenericEnvClient

from hiper_fast import envs

TURNS = 50  # after which an episode is left
SERVER = "-m", "hiper_fast.serve"


def play_here(name: str, seconds: float) -> float:
    env, rng, steps = envs.make(name), random.Random(0), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        _, info = env.reset(seed=steps)
        for _ in range(TURNS):
            *_, info = env.step(rng.choice(info["admissible_commands"]))
        steps += TURNS
    return steps / (time.perf_counter() - end + seconds)


async def play_session(client: GenericEnvClient, number: int, end: float) -> int:
    rng, steps = random.Random(number), 0
    while time.perf_counter() < end:
        result = await client.reset(seed=steps + number)
        for _ in range(TURNS):
            commands = result.observation["admissible_commands"]
            result = await client.step({"command": rng.choice(commands)})
        steps += TURNS
    return steps


async def play_there(url: str, sessions: int, seconds: float) -> float:
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
    return steps / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", nargs="?", default="household")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    print(f"in process: {play_here(arguments.env, arguments.seconds):,.0f} steps/s")
    command = [sys.executable, *SERVER, arguments.env, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[2].rstrip(";")
            for sessions in (1, 64):
                rate = asyncio.run(play_there(url, sessions, arguments.seconds))
                print(f"{sessions} sessions: {rate:,.0f} steps/s", flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
