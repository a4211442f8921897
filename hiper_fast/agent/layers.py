"""A trunk's layers: recomputed in the backward pass, or compiled."""

from __future__ import annotations

import functools
import textwrap

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from hiper_fast.agent import attention
from hiper_fast.options import ConfigError


def find_layers(trunk: nn.Module) -> list[nn.Module]:
    return [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute(trunk: nn.Module) -> None:
    """Has the layers keep their inputs alone and run again in the backward pass."""
    for layer in find_layers(trunk):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    trunk.register_forward_pre_hook(recompute_with_gradients)


def recompute_with_gradients(trunk: nn.Module, inputs: tuple) -> None:
    """A layer in training mode recomputes itself: not in rollouts, which need its KV cache."""
    for layer in find_layers(trunk):
        layer.training = torch.is_grad_enabled()


def compile_layers(trunk: nn.Module) -> None:
    """Compiles the layers one by one: they share their code, so it is compiled once."""
    for layer in find_layers(trunk):
        layer.compile(dynamic=True)


def check_compiler(device: torch.device) -> None:
    """ConfigError if torch.compile does not work here."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:
        reason = textwrap.shorten(str(error), 200)
        raise ConfigError(
            f"model.compile: torch.compile does not work here ({reason}); leave it false"
        ) from error


def keep_attention_eager() -> None:
    """Leaves packed attention uncompiled: each microbatch has lengths of its own."""
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
