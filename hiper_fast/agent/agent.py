"""The agent's networks: the language model, its tokenizer, and a critic with three heads."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiper_fast import ops
from hiper_fast.agent import attention, fused, varlen
from hiper_fast.agent.head import measure, read_hidden
from hiper_fast.agent.layers import compile_layers, find_layers
from hiper_fast.agent.lora import list_zero_starts
from hiper_fast.agent.speaker import Speaker
from hiper_fast.agent.tokens import list_pieces, vocabulary_size
from hiper_fast.config import ModelConfig
from hiper_fast.distributed import ALONE, World, call_inside
from hiper_fast.packing import BLANK, Microbatch

HEADS = 3  # low, high, switch


class Critic(nn.Module):
    """A value of each head at a position, from a trunk of its own (paper) or the policy's."""

    def __init__(self, trunk: nn.Module | None, hidden_size: int, device: torch.device):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.Linear(hidden_size, HEADS, device=device)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> float32 [..., 3]."""
        # Of more dimensions a linear layer returns a view: FSDP warns of them.
        rows = hidden.float().flatten(0, -2)  # [rows, h]
        return self.heads(rows).unflatten(0, hidden.shape[:-1])


class Agent(Speaker):
    """Policy, critic and frozen reference, with the passes that rollouts and updates need."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        *,
        tiny: bool,
        world: World = ALONE,
    ):
        attention.use(model)
        if not config.compile:  # the compiler fuses these itself
            fused.use(model)
        pieces = list_pieces(tokenizer, len(model.get_input_embeddings().weight))
        super().__init__(tokenizer, pieces, find_stop_ids(model, tokenizer), world)
        self.model, self.config, self.tiny = model, config, tiny
        self.critic: Critic | None = None
        self.reference: PreTrainedModel | None = None
        self.shares_prefixes = True  # until a probe finds otherwise
        self.lora = hasattr(model, "peft_config")
        self.head = measure(model, vocabulary_size(tokenizer))
        self.width = measure_width(model.base_model if config.critic == "separate" else model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def add_critic(self) -> Critic:
        """The critic, its trunk from the policy's present weights; its heads start at zero."""
        separate = self.config.critic == "separate"
        trunk = self._copy_network(self.model.base_model) if separate else None
        self.critic = Critic(trunk, self.width, self.device)
        self.world.shard(self.critic.heads)
        return self.critic

    def freeze_reference(self) -> None:
        """Keeps the present policy as the KL term's reference. LoRA's base is not copied."""
        self.reference = self._copy_network(self.model, frozen=True)
        if self.lora:
            if not any(factor.any() for factor in list_zero_starts(self.reference)):
                self.reference.disable_adapters()  # not trained yet: the base model itself

    def shard(self) -> None:
        """Spreads the policy over the processes, after reference and critic were copied from it."""
        self.world.shard(self.model, find_layers(self.model))

    def _copy_network(self, module: nn.Module, *, frozen: bool = False) -> nn.Module:
        """A copy that shares the frozen weights alone, spread over the processes."""
        shared = {id(p): p for p in module.parameters() if not p.requires_grad}
        copied = copy.deepcopy(module, shared)
        if frozen:
            copied.eval().requires_grad_(False)
        if self.config.compile:
            compile_layers(copied)
        return self.world.shard(copied, find_layers(copied))

    def eager(self) -> contextlib.AbstractContextManager:
        """Through a cache: compiled layers would be compiled anew for every layer's keys and values."""
        if self.config.compile:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()

    @torch.no_grad()
    def find_attention(self) -> list[varlen.Choice]:
        """What packed passes attend by, for each kind of its layers, found by reading one token."""
        witness = attention.Witness()
        with self.eager(), attention.through(witness):
            self.trunk(BLANK.to(self.device))
        return list(witness.choices)

    def trunk(self, batch: Microbatch, *, reference: bool = False) -> Tensor:
        """Last hidden states [tokens, h] of packed sequences."""
        return run_trunk(self.reference if reference else self.model, batch)

    def critic_hidden(self, batch: Microbatch, policy_hidden: Tensor | None = None) -> Tensor:
        """The hidden states [tokens, h] that the critic's heads read."""
        if self.critic.trunk is not None:
            return run_trunk(self.critic.trunk, batch)
        return self.trunk(batch) if policy_hidden is None else policy_hidden

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        *,
        reference: bool = False,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs, float32 [n], of `targets` [n], and if asked for entropies [n]; `hidden` [n, h] predicts them."""
        model = self.reference if reference else self.model
        options = {"targets": targets, "entropy": entropy}
        return self._apply(ops.linear_logprobs, model, hidden, temperature, options)

    def ppo_loss(
        self, hidden: Tensor, *data: Tensor, temperature: float, **options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`ops.linear_ppo` through the head; `data`: targets, old log-probs, advantages, [n]."""
        names = "targets", "old_logprobs", "advantages"
        options |= zip(names, data, strict=True)
        return self._apply(ops.linear_ppo, self.model, hidden, temperature, options)

    def _apply(
        self,
        op: Callable,
        model: PreTrainedModel,
        hidden: Tensor,
        temperature: float,
        options: dict,
    ):
        def run():
            rows, weights = self.head.take_weights(model, hidden)
            return op(rows, **weights, **self.head.temper(temperature), **options)

        return call_inside(model, run)


def run_trunk(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """What a model's head reads [tokens, h], or a trunk's last hidden states, of packed sequences, each as if alone."""
    options = attention.describe_packing(batch)
    options |= {"position_ids": batch.position_ids[None], "use_cache": False}
    return call_inside(model, lambda: read_hidden(model, batch.input_ids[None], **options))[0]


@torch.no_grad()
def measure_width(model: PreTrainedModel) -> int:
    """h of what `run_trunk` gives; not always the embedding's."""
    return run_trunk(model, BLANK.to(model.device)).shape[-1]


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the model's and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    return tuple(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))
