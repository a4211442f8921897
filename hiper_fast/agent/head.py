"""What stands between a model's trunk and its logits: measured on the model, not read off its class.

The fused ops make the last product, `hidden @ weight.T`, themselves. So they need what goes into it, whatever
layers a model puts before it, and what the model does with its result: nothing, a factor, or a soft cap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiper_fast.options import ConfigError

SMALL, LARGE = 2.0**-10, 2.0**20  # where a capped logit is still its own, and where it is its cap


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(scale * product / softcap) of the first `vocabulary` tokens; no cap where it is None."""

    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None

    def take_weights(self, model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, dict]:
        """`hidden` [n, h] and the options weight [v, h] and bias [v] or None of the linear ops; LoRA beside them."""
        head = model.get_output_embeddings()
        plain = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        weight, bias = plain.weight, getattr(plain, "bias", None)
        for factor, columns in list_adapters(head):
            hidden = torch.cat([hidden, factor(hidden).to(hidden.dtype)], 1)
            weight = torch.cat([weight, columns.to(weight.dtype)], 1)
        if self.vocabulary < len(weight):
            weight, bias = (
                weight[: self.vocabulary],
                None if bias is None else bias[: self.vocabulary],
            )
        return hidden, {"weight": weight, "bias": bias}

    def finish(self, product: Tensor) -> Tensor:
        """The product [n, v] as logits [n, vocabulary], float32 unless they are the product's own."""
        logits = product[:, : self.vocabulary]
        if self.scale != 1.0:
            logits = logits.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits

    def temper(self, temperature: float) -> dict:
        """The options temperature and softcap of the linear ops, for logits over `temperature`."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap}


def list_adapters(head: nn.Module) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Of each LoRA adapter at work on the head: hidden [n, h] -> [n, r], and the columns [v, r] that it multiplies."""
    if getattr(head, "disable_adapters", True):
        return
    for name in head.active_adapters:
        if name in getattr(head, "lora_A", ()):
            a, scaling = head.lora_A[name], head.scaling[name]
            yield (
                lambda x, a=a, scaling=scaling: a(x.to(a.weight.dtype)) * scaling,
                head.lora_B[name].weight,
            )


@contextlib.contextmanager
def replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the module `head` computes `forward`; FSDP and adapters see no other module."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def read_hidden(model: PreTrainedModel, ids: Tensor, **options) -> Tensor:
    """What goes into the last product [1, tokens, h], which is not made; a trunk gives its last hidden states."""
    head = model.get_output_embeddings()
    if head is None:
        return model(ids, **options).last_hidden_state
    read = []

    def keep(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden.detach()[..., :1]

    with replaced(head, keep):
        model.forward(
            ids, **options
        )  # not model(…): the hooks of a sharded one are those of `call_inside`
    return read[-1]


@torch.no_grad()
def measure(model: PreTrainedModel, vocabulary: int) -> Head:
    """The head of a model, by logits that are put in the product's place; ConfigError if it fits none."""
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None or not hasattr(head, "weight"):
        raise ConfigError(
            f"model.path: {name} has no linear layer that ends in logits; use another model"
        )
    rows = len(head.weight)
    given = torch.linspace(-64, 64, rows, device=model.device)
    given[:2] = torch.tensor([SMALL, LARGE])
    given = given[:rows]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with replaced(head, lambda hidden: given.expand(*hidden.shape[:-1], -1)):
        found = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    given, scale, largest = given[: len(found)], float(found[0]) / SMALL, float(found[1])
    softcap = None if largest > scale * LARGE / 2 else largest
    expected = scale * given
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not scale > 0 or not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ConfigError(
            f"model.path: {name} changes its logits by more than a factor and a soft cap, which the fused log-probs "
            "cannot; use another model"
        )
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    return Head(min(vocabulary, len(found)), scale, softcap)
