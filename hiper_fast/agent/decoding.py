"""Sequences on their way, each a row: their prompts are read and their tokens drawn, many in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.cache import PagedCache, Pass
from hiper_fast.packing import prefix_sums

SIZES = (1, 2, 4, 8, *range(16, 513, 16))  # of the batches whose step is captured as a CUDA graph
WARM_UP = 2  # steps before a capture


@dataclass(slots=True)
class Entering:
    """A sequence that gets a row."""

    row: int
    ids: list[int]  # its prompt
    held: int  # how many of them the cache holds
    blocks: list[int]  # where they and what follows lie
    uniforms: np.ndarray  # float64 [limit], of its draws
    temperature: float


class Decoder:
    """`count` rows, and one more that is nobody's: it fills up batches, and lies in block 0.

    All that changes at a step stays on the model's device.
    """

    def __init__(self, agent: Agent, cache: PagedCache, count: int, most: int, limit: int):
        """most: blocks of a sequence; limit: tokens of a response."""
        self.agent, self.cache, self.nobody, self.limit = agent, cache, count, limit
        self.size = cache.pools[0][0].shape[1]
        with torch.device(agent.device):
            self.stop = torch.tensor(agent.stop_ids, dtype=torch.int64)
            self.blocks = torch.zeros(count + 1, most, dtype=torch.int32)
            self.length = torch.zeros(count + 1, dtype=torch.int64)  # tokens that were read
            self.token = torch.zeros(count + 1, dtype=torch.int64)  # the last one drawn
            self.drawn = torch.zeros(count + 1, dtype=torch.int64)  # how many were
            self.ended = torch.ones(count + 1, dtype=torch.bool)
            self.temperature = torch.ones(count + 1)
            # One column more, for what an ended row draws.
            self.uniforms = torch.zeros(count + 1, limit + 1, dtype=torch.float64)
            self.ids = torch.zeros(count + 1, limit + 1, dtype=torch.int64)
            self.logprobs = torch.zeros(count + 1, limit + 1)
        self.graphs = Graphs(self.step, self.nobody) if agent.device.type == "cuda" else None

    @torch.inference_mode()
    def read(self, entering: Sequence[Entering], going: Sequence[int]) -> None:
        """One pass: the prompts of those that enter, and another token of each row that goes on."""
        if not entering:
            return self.go_on(going)
        device = self.agent.device
        self.place(entering)
        new = [one.row for one in entering]
        unread = [len(one.ids) - one.held for one in entering]
        ids = np.concatenate([one.ids[one.held :] for one in entering])
        places = np.concatenate([np.arange(one.held, len(one.ids)) for one in entering])
        owners = np.repeat(new, unread)
        ids, places, owners = (torch.from_numpy(x).to(device) for x in (ids, places, owners))
        rows = torch.tensor([*new, *going], device=device)
        old = rows[len(new) :]
        self.length[rows[: len(new)]] = torch.tensor([len(e.ids) for e in entering], device=device)
        before = self.length[old]
        self.length[old] += 1
        positions = torch.cat([places, before])
        what = Pass(
            ids=torch.cat([ids, self.token[old]]),
            positions=positions,
            slots=self.find_slots(torch.cat([owners, old]), positions),
            blocks=self.blocks[rows],
            cu_query=prefix_sums(unread + [1] * len(going)).to(device),
            lengths=self.length[rows].int(),
        )
        self.draw(rows, self.cache.read(self.agent.model, self.agent.head, what))

    @torch.inference_mode()
    def go_on(self, going: Sequence[int]) -> None:
        """One pass: another token of each row."""
        if self.graphs is not None:
            self.graphs.run(going)
        else:
            self.step(torch.tensor(going, device=self.agent.device))

    def place(self, entering: Sequence[Entering]) -> None:
        """Gives the sequences their rows."""
        blocks = np.zeros((len(entering), self.blocks.shape[1]), dtype=np.int32)
        uniforms = np.zeros((len(entering), self.limit + 1))
        for place, one in enumerate(entering):
            blocks[place, : len(one.blocks)] = one.blocks
            uniforms[place, : self.limit] = one.uniforms
        rows = torch.tensor([one.row for one in entering], device=self.agent.device)
        self.blocks[rows] = torch.from_numpy(blocks).to(rows.device)
        self.uniforms[rows] = torch.from_numpy(uniforms).to(rows.device)
        self.temperature[rows] = torch.tensor([e.temperature for e in entering]).to(rows.device)
        self.drawn[rows], self.ended[rows] = 0, False

    def step(self, rows: Tensor) -> None:
        """Another token of each of `rows` int64 [n]; reads nothing back and fits a CUDA graph.

        A row that has ended draws to no avail, and writes where nothing is read.
        """
        before = self.length[rows]
        self.length[rows] = before + (~self.ended[rows]).long()
        what = Pass(
            ids=self.token[rows],
            positions=before,
            slots=self.find_slots(rows, before),
            blocks=self.blocks[rows],
            cu_query=torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            lengths=(before + 1).int(),
        )
        self.draw(rows, self.cache.read(self.agent.model, self.agent.head, what))

    def find_slots(self, rows: Tensor, places: Tensor) -> Tensor:
        return self.blocks[rows, places // self.size].long() * self.size + places % self.size

    def draw(self, rows: Tensor, logits: Tensor) -> None:
        """A token for each row, of its logits [n, v]."""
        going, drawn = ~self.ended[rows], self.drawn[rows]
        uniform = self.uniforms[rows, drawn]
        tokens, logprobs = ops.sample(logits, uniform, self.temperature[rows])
        column = torch.where(going, drawn, self.limit)
        self.ids[rows, column], self.logprobs[rows, column] = tokens, logprobs
        self.token[rows] = tokens
        drawn = drawn + going
        self.drawn[rows] = drawn
        stopped = (tokens[:, None] == self.stop).any(1) | (drawn == self.limit)
        self.ended[rows] = ~going | stopped

    def take_ended(self, rows: Sequence[int]) -> list[tuple[int, list[int], list[float]]]:
        """(row, ids, log-probs) of those of `rows` whose response is whole."""
        index = torch.tensor(rows, device=self.agent.device)
        ended = index[self.ended[index]]
        lists = (x[ended].tolist() for x in (self.drawn, self.ids, self.logprobs))
        return [
            (row, ids[:count], logprobs[:count])
            for row, count, ids, logprobs in zip(ended.tolist(), *lists, strict=True)
        ]


class Graphs:
    """A step of many rows as one launch, for batches of the SIZES; where a model cannot be captured, as it is."""

    def __init__(self, step: Callable[[Tensor], None], nobody: int):
        self.step, self.nobody = step, nobody
        self.captured: dict[int, tuple[Tensor, Callable[[], None]]] = {}  # size -> rows, replay
        self.works = True
        self.pool = (
            None  # of memory, the first graph's: one runs at a time, and leaves nothing in it
        )

    def run(self, rows: Sequence[int]) -> None:
        size = next((size for size in SIZES if size >= len(rows)), len(rows))
        filled = torch.tensor([*rows, *[self.nobody] * (size - len(rows))])
        if size not in self.captured and self.works:
            self.capture(size)
        if size in self.captured:
            static, replay = self.captured[size]
            static.copy_(filled, non_blocking=True)
            replay()
        else:
            self.step(filled.cuda())

    def capture(self, size: int) -> None:
        """The warm-up and the capture are of nobody's row."""
        static = torch.full((size,), self.nobody, device="cuda")
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.step(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Another thread may go on meanwhile, and take memory. Where it fails, its stream stays the current one.
            captured = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
            with torch.cuda.stream(torch.cuda.current_stream()), captured:
                self.step(static)
            self.pool = graph.pool()
        except RuntimeError as error:
            self.works = False
            warnings.warn(f"decoding without CUDA graphs, slower: {error}", stacklevel=2)
        else:
            self.captured[size] = static, graph.replay
