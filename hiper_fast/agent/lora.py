"""LoRA: the model frozen, small adapters in its layers trained."""

from __future__ import annotations

import copy
import re
import textwrap
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiper_fast.config import ModelConfig
from hiper_fast.options import ConfigError

ZERO_STARTS = re.compile("lora_B|lora_embedding_A")


def import_peft(option: str) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"{option}: LoRA needs peft ({error}); pip install 'hiper_fast[lora]'"
        ) from error
    return peft


def add_lora(model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
    """Freezes the model; its layers get adapters, drawn from `seed`, that change nothing yet."""
    lora = import_peft("model.lora_rank").LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(lora)
        except ValueError as error:
            option = "model.lora_targets" if config.lora_targets else "model.lora_rank"
            raise ConfigError(f"{option}: {textwrap.shorten(str(error), 300)}") from error


def list_zero_starts(model: nn.Module) -> list[Tensor]:
    """The factors of the adapters that start at zero: until they are trained an adapter changes nothing."""
    return [p for name, p in model.named_parameters() if ZERO_STARTS.search(name)]


def load_adapters(model: PreTrainedModel) -> bool:
    """Makes those active that the model came with, saved by a run with LoRA; False without."""
    has_adapters = hasattr(model, "peft_config")
    if has_adapters:
        model.set_adapter("default")
    return has_adapters


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters work on a layer, or a trained copy stands in its place."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without adapters that computes the same; this one stays as it is."""
    adapted = {name: module for name, module in model.named_modules() if is_adapted(module)}
    inside = tuple(f"{name}." for name in adapted)
    state = {name: w for name, w in model.state_dict().items() if not name.startswith(inside)}
    for name, module in adapted.items():
        merged = merge(module).state_dict()
        state |= {f"{name}.{part}": weight for part, weight in merged.items()}
    return state


def merge(module: nn.Module) -> nn.Module:
    """A plain layer that computes what an adapted one does."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[module.active_adapter]
    module = copy.deepcopy(module)
    module.merge()
    return module.get_base_layer()
