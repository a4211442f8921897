"""At load: what is sampled is what is trained. The ways to a token's log-prob, on two short random sequences.

A probe is made of the model as it came, which reads each sequence by itself; `check` then asks the agent: packed
through the fused head, as an update does, and step by step through a paged cache, as a rollout does. A
model whose architecture makes them differ would train on ratios that are wrong from the first update on. Where only
what sequences begin with cannot be read once for all, they are read whole.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hiper_fast.agent.agent import Agent, run_trunk
from hiper_fast.agent.cache import PagedCache, Pass, measure_shapes
from hiper_fast.agent.lora import list_zero_starts
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums

LENGTHS, COMMON = (19, 9), 3  # tokens of the two sequences, and how many both begin with
WINDOW_NAMES = re.compile(
    "sliding_window(_size)?|attention_window(_size)?|window_size|local_attention"
)
WINDOW = 5  # how far sliding attention looks back meanwhile, so that the first is longer
LAST = 5  # tokens of each that are compared, the last ones
STEPS = 2  # of them sampled one by one
BLOCK = 4  # tokens of the cache meanwhile
# The largest difference, in units of how much the model's log-probs of a next token differ among themselves.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
ROUNDING = 1e-5  # nats, also where they hardly differ
SEED = 2602_16165


class Probe:
    """The sequences, and what the model gives for each alone, float32 log-probs [2, LAST, v]."""

    def __init__(self, model: PreTrainedModel):
        generator = torch.Generator().manual_seed(SEED)
        most = len(model.get_input_embeddings().weight)
        self.sequences = [
            torch.randint(most, (length,), generator=generator).to(model.device)
            for length in LENGTHS
        ]
        self.sequences[1][:COMMON] = self.sequences[0][:COMMON]
        with stirred(model), narrowed(model), torch.no_grad():
            alone = [
                model(input_ids=ids[None], use_cache=False, logits_to_keep=LAST + 1)
                for ids in self.sequences
            ]
        self.logits = torch.stack([out.logits[0, -LAST - 1 : -1].float() for out in alone])

    def check(self, agent: Agent) -> None:
        """ConfigError that says which way differs from the model's own, and by how much; settles `shares_prefixes`."""
        model = agent.model
        expected = self.logits[..., : agent.head.vocabulary].log_softmax(-1)
        spread = float(expected.std(-1).median())
        targets = torch.stack([ids[-LAST:] for ids in self.sequences])
        targets = targets.clamp(max=agent.head.vocabulary - 1)
        with stirred(model), narrowed(model), torch.no_grad():
            ways = {
                "packed into one sequence, as updates read them": self.read_packed(agent, targets),
                "step by step with a cache, as rollouts sample": self.read_in_steps(agent),
                "step by step after a past, as conversations go on": self.read_in_steps(
                    agent, pasts=True
                ),
            }
            shared = self.read_packed(agent, targets, share=True)
        known = expected.gather(-1, targets[..., None])[..., 0]
        allowed = max(ROUNDING, TOLERANCE[model.dtype] * spread)
        for way, found in ways.items():
            wanted = known if found.dim() == 2 else expected[:, -STEPS - 1 :]
            worst = float((found - wanted).abs().max())
            if not worst <= allowed:
                raise ConfigError(
                    f"model.path: {type(model).__name__} gives other log-probs when its sequences are {way}, than "
                    f"when each is read alone: by up to {worst:.2g}, where they spread by {spread:.2g}; it "
                    "cannot be trained here: use another model"
                )

        worst = float((shared - known).abs().max())
        agent.shares_prefixes = worst <= allowed
        if not agent.shares_prefixes:
            warnings.warn(
                f"turns are read whole, slower: {type(model).__name__} gives log-probs that differ by up to "
                f"{worst:.2g} where sequences read what they begin with once (train.share_prefixes)",
                stacklevel=2,
            )

    def read_packed(self, agent: Agent, targets: Tensor, *, share: bool = False) -> Tensor:
        """Log-probs [2, LAST] of `targets`; share: what both sequences begin with is read once."""
        ids, cu = torch.cat(self.sequences).cpu(), prefix_sums([len(s) for s in self.sequences])
        [batch] = microbatches(ids, cu, len(ids), share=share)
        hidden = run_trunk(agent.model, batch.to(agent.device))
        ends = batch.cu_seqlens[1:][batch.index.argsort()].tolist()
        rows = torch.cat([hidden[end - LAST - 1 : end - 1] for end in ends])
        return agent.logprobs(rows, targets.flatten(), 1.0).view(2, LAST)

    def read_in_steps(self, agent: Agent, *, pasts: bool = False) -> Tensor:
        """Log-probs [2, STEPS + 1, v] of all tokens, the last STEPS + 1 times.

        pasts: the first half of each is read in a pass before.
        """
        lengths = [len(ids) for ids in self.sequences]
        begun = [length - STEPS - 1 for length in lengths]
        parts = [[(0, end) for end in begun]]
        if pasts:
            parts = [[(0, end // 2) for end in begun], [(end // 2, end) for end in begun]]
        parts += [[(end + i, end + i + 1) for end in begun] for i in range(STEPS)]
        most = -(-max(lengths) // BLOCK)
        cache = PagedCache(
            measure_shapes(agent.model), len(lengths) * most, BLOCK, agent.model.device
        )
        blocks = torch.arange(len(lengths) * most, dtype=torch.int32).view(-1, most).flip(1)
        found = [
            cache.read(agent.model, agent.head, self.make_pass(part, blocks).to(agent.device))
            for part in parts
        ]
        return torch.stack(found[-STEPS - 1 :], 1).float().log_softmax(-1)

    def make_pass(self, part: list[tuple[int, int]], blocks: Tensor) -> Pass:
        """One that reads the tokens from begin to end of each sequence."""
        places = [torch.arange(begin, end) for begin, end in part]
        slots = [
            blocks[row, place // BLOCK].long() * BLOCK + place % BLOCK
            for row, place in enumerate(places)
        ]
        return Pass(
            ids=torch.cat(
                [
                    ids[begin:end].cpu()
                    for ids, (begin, end) in zip(self.sequences, part, strict=True)
                ]
            ),
            positions=torch.cat(places),
            slots=torch.cat(slots),
            blocks=blocks,
            cu_query=prefix_sums([len(place) for place in places]),
            lengths=torch.tensor([end for _, end in part], dtype=torch.int32),
        )


@contextlib.contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """Within, windows are WINDOW tokens long, so that short sequences show what they do.

    Those as long as all positions are left alone: nothing is longer.
    """
    positions = getattr(
        model.config.get_text_config(decoder=True), "max_position_embeddings", math.inf
    )
    owners = {
        id(o): o for module in model.modules() for o in (module, getattr(module, "config", module))
    }
    found = [
        (owner, name, value)
        for owner in owners.values()
        for name, value in vars(owner).items()
        if WINDOW_NAMES.fullmatch(name) and type(value) is int and WINDOW < value < positions
    ]
    for owner, name, _ in found:
        setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


@contextlib.contextmanager
def stirred(model: PreTrainedModel) -> Iterator[None]:
    """Within, adapters that change nothing yet do: else a head that forgets them would pass."""
    fresh = [factor for factor in list_zero_starts(model) if not factor.any()]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in fresh:
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[0] ** 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in fresh:
                p.zero_()
