"""The built-in engine: the model that trains, through a paged cache; requests join and leave at every step."""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass

import torch

from hiper_fast.agent.agent import Agent
from hiper_fast.agent.blocks import Blocks
from hiper_fast.agent.cache import PagedCache, count_bytes, measure_shapes
from hiper_fast.agent.decoding import Decoder, Entering
from hiper_fast.config import Config, RolloutConfig
from hiper_fast.options import ConfigError, option
from hiper_fast.rollout.draws import uniforms
from hiper_fast.rollout.engines import Answer, Request

BLOCK = {"cpu": 8, "cuda": 16}  # tokens; smaller ones share more, larger ones are read faster
STEPS = {"cpu": 1, "cuda": 8}  # before the host looks which responses are whole
SHARE = 0.5  # of a GPU's free memory or of the CPU's, at most
GIB = 2**30


@dataclass(slots=True)
class Options(RolloutConfig):
    cache_gb: float = option(
        0.0,
        "GiB of keys and values; 0: as much as rollout.slots responses need, at most half of what a GPU has free, or a "
        "CPU at all",
        least=0,
        local=True,
    )


class Engine:
    """The same seed, ids and weights give the same answer, whatever runs beside it, but for rounding.

    What prompts have in common, as instructions or the turns of a conversation, is read once.
    """

    Options = Options

    def __init__(self, agent: Agent, config: Config):
        self.agent, self.budget, self.limit = (
            agent,
            config.agent.batch_tokens,
            config.agent.max_response_tokens,
        )
        self.room = config.agent.max_prompt_tokens + self.limit
        self.capacity, self.cache_gb = config.rollout.slots, config.rollout.cache_gb
        kind = agent.device.type
        self.size, self.steps = BLOCK.get(kind, BLOCK["cuda"]), STEPS.get(kind, STEPS["cuda"])
        self.shapes = measure_shapes(agent.model)
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: dict[int, tuple[int, Request, list[int]]] = {}  # row -> key, request, blocks
        self.free: list[int] = []  # rows
        self.blocks: Blocks | None = None  # None: asleep
        self.decoder: Decoder | None = None

    def wake(self) -> None:
        most = -(-self.room // self.size)
        count = min(self.capacity * most, self.count_affordable())
        if count < most:
            raise ConfigError(
                f"rollout.cache_gb: one response needs {self.measure(most):.2f} GiB of keys and values, and "
                f"{self.measure(count):.2f} can be had; give more, or lower agent.max_prompt_tokens"
            )
        # Block 0 is nobody's.
        cache = PagedCache(self.shapes, count + 1, self.size, self.agent.device)
        self.blocks = Blocks(count, self.size, first=1)
        self.decoder = Decoder(self.agent, cache, self.capacity, most, self.limit)
        self.free = list(range(self.capacity))[::-1]

    def count_affordable(self) -> int:
        """Blocks that the memory allows."""
        if self.cache_gb:
            room = self.cache_gb * GIB
        elif self.agent.device.type == "cuda":
            room = SHARE * count_free(self.agent.device)
        else:
            room = SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(room // (self.size * count_bytes(self.shapes)))

    def measure(self, blocks: int) -> float:
        """GiB."""
        return blocks * self.size * count_bytes(self.shapes) / GIB

    def update(self) -> None:
        self.blocks.forget()

    def submit(self, key: int, request: Request) -> None:
        self.waiting.append((key, request))

    def collect(self) -> list[tuple[int, Answer]]:
        going = list(self.running)
        entering = self.admit()
        if not self.running:
            return []
        with self.agent.eager():
            self.decoder.read(entering, going)
            going = list(self.running)
            for _ in range(self.steps - 1):
                self.decoder.go_on(going)
        return [self.finish(*one) for one in self.decoder.take_ended(going)]

    def admit(self) -> list[Entering]:
        """Gives waiting requests a row and blocks, as many as there are, within the budget of a pass."""
        entering, left = [], self.budget
        while self.waiting and self.free:
            key, request = self.waiting[0]
            room, most = len(request.ids) + self.limit, left if entering else math.inf
            taken = self.blocks.take(request.ids, room, most)
            if taken is None:
                break
            blocks, held = taken
            left -= len(request.ids) - held
            self.waiting.popleft()
            row = self.free.pop()
            self.running[row] = key, request, blocks
            drawn = uniforms(request.seed, self.limit)
            entering.append(Entering(row, request.ids, held, blocks, drawn, request.temperature))
        return entering

    def finish(self, row: int, ids: list[int], logprobs: list[float]) -> tuple[int, Answer]:
        key, request, blocks = self.running[row]
        if request.conversation is not None:
            self.blocks.note(request.ids + ids[:-1], blocks)  # the last one was not read
        self.leave(row)
        return key, Answer(ids, logprobs)

    def leave(self, row: int) -> None:
        _, _, blocks = self.running.pop(row)
        self.blocks.give_back(blocks)
        self.free.append(row)

    def cancel(self, key: int) -> None:
        self.waiting = deque(one for one in self.waiting if one[0] != key)
        for row in [row for row, (other, _, _) in self.running.items() if other == key]:
            self.leave(row)

    def sleep(self) -> None:
        self.waiting.clear()
        self.running.clear()
        self.blocks = self.decoder = None

    def close(self) -> None:
        self.sleep()


def count_free(device: torch.device) -> int:
    """Bytes of a GPU's memory, those among them that torch keeps from what was given back."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
