"""AdamW as the options ask: float32 masters, 8-bit states, or both in the CPU's memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config, TrainConfig
from hiper_fast.options import ConfigError

MUON = 8.0  # its learning rate over AdamW's
IMITATION_BETAS = (0.9, 0.98)


def build_optimizers(agent: Agent, config: Config) -> dict[str, Optimizer]:
    """An optimiser each for the policy and, if there is one, for the critic."""
    options = {"betas": (0.9, config.train.beta2), "eps": config.train.eps}
    optimizers = {"policy": build_adamw(agent.model.parameters(), config.train, **options)}
    if agent.critic is not None:
        optimizers["critic"] = build_adamw(agent.critic.parameters(), config.train, **options)
    if agent.world.size > 1 and agent.config.dtype == "bfloat16":
        for optimizer in optimizers.values():
            store_masters(optimizer)
    return optimizers


def build_imitation_optimizers(agent: Agent, config: TrainConfig) -> list[tuple[Optimizer, float]]:
    """The warm start's optimisers, each with its share of the learning rate.

    AdamW, and Muon for the matrices of the tiny model, which from random weights learns to copy in
    fewer steps with it.
    """
    embedding = agent.model.get_input_embeddings().weight
    matrices, rest = [], []
    for weight in agent.model.parameters():
        is_matrix = weight.ndim == 2 and weight.dtype == torch.float32 and weight is not embedding
        (matrices if agent.tiny and is_matrix else rest).append(weight)
    optimizers = [(build_adamw(rest, config, betas=IMITATION_BETAS), 1.0)]
    if matrices:
        optimizers.append((Muon(matrices, weight_decay=config.weight_decay), MUON))
    return optimizers


def build_adamw(
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over those parameters that train; `set_lr` gives it its learning rate.

    Weights in bfloat16 get float32 masters and gradients unless `train.master_weights` is off.
    Float32 weights (and so FSDP's float32 shards) are masters themselves. `offload` keeps masters
    and states of GPU weights on the CPU.
    """
    parameters = [p for p in parameters if p.requires_grad]
    offload = config.optimizer == "offload"
    place = {"device": "cpu"} if offload else {}
    place |= {"dtype": torch.float32} if config.master_weights else {}
    masters = [p.detach().to(**place, non_blocking=True) for p in parameters]
    if config.optimizer == "adamw8bit":
        make = build_adamw_8bit
    else:
        make = functools.partial(AdamW, fused=offload or any(m.is_cuda for m in masters) or None)
    make = functools.partial(make, betas=betas, eps=eps, weight_decay=config.weight_decay)
    pairs = zip(parameters, masters, strict=True)
    same = all(p.dtype == master.dtype and p.device == master.device for p, master in pairs)
    return make(parameters) if same else MasterWeights(parameters, masters, make)


def schedule(optimizers: dict[str, Optimizer], step: int, config: TrainConfig) -> bool:
    """Sets the learning rates of update `step`; returns whether the policy trains yet."""
    alone = config.critic_updates if "critic" in optimizers else 0  # updates of the critic
    updates = step - alone  # the policy's so far, this one included
    share = 1 - (1 - config.final_lr) * step / config.updates
    rise = min(1.0, updates / max(1, config.warmup_updates))
    set_lr(optimizers["policy"], config.lr * share * rise)
    if "critic" in optimizers:
        set_lr(optimizers["critic"], config.critic_lr * share)
    return updates > 0


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class MasterWeights(Optimizer):
    """Steps `masters` (float32, perhaps on the CPU) by what `make` builds; rounds them to weights.

    Small updates that bfloat16 weights would round away add up in the masters. Gradients are
    float32 too, so they also add up over microbatches. `state_dict` holds each master beside its
    moments.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        masters: list[Tensor],
        make: Callable[..., Optimizer],
    ):
        self.masters = masters
        self.inner = make(masters)
        super().__init__(parameters, self.inner.defaults)
        self.param_groups[0]["lr"] = self.inner.param_groups[0]["lr"]
        self.offloaded = False
        for p, master in zip(parameters, masters, strict=True):
            p.grad_dtype = master.dtype
            self.offloaded |= p.device != master.device
        self._wait()

    def _wait(self) -> None:
        """Until what is on its way to the CPU has arrived."""
        if self.offloaded:
            torch.cuda.synchronize()

    @torch.no_grad()
    def step(self) -> None:
        weights = self.param_groups[0]["params"]
        for p, master in zip(weights, self.masters, strict=True):
            if p.grad is not None:
                master.grad = p.grad.to(master.device, master.dtype, non_blocking=True)
        self._wait()
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for p, master in zip(weights, self.masters, strict=True):
            p.copy_(master, non_blocking=True)
            master.grad = None

    def state_dict(self) -> dict:
        return add_masters(self.inner.state_dict(), self.masters)

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Masters that were not stored (of weights never stepped, say) start from the weights."""
        pairs = zip(self.param_groups[0]["params"], self.masters, strict=True)
        for number, (p, master) in enumerate(pairs):
            master.copy_(saved["state"].get(number, {}).get("master", p))
            p.copy_(master)
        self.inner.load_state_dict(drop_masters(saved))
        self.param_groups[0]["lr"] = self.inner.param_groups[0]["lr"]


def add_masters(saved: dict, masters: list[Tensor]) -> dict:
    """A state dict that holds each master beside its moments."""
    state = {i: entries | {"master": masters[i]} for i, entries in saved["state"].items()}
    return saved | {"state": state}


def drop_masters(saved: dict) -> dict:
    state = {i: dict(entries) for i, entries in saved["state"].items()}
    for entries in state.values():
        entries.pop("master", None)
    return saved | {"state": state}


def store_masters(optimizer: Optimizer) -> None:
    """Has the state dict of FSDP's float32 shards hold masters, as `MasterWeights` reads them."""

    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def add(_, saved: dict) -> dict:
        return add_masters(saved, [weight.detach() for weight in weights])

    @torch.no_grad()
    def take(_, saved: dict) -> dict:
        for number, entries in saved["state"].items():
            if "master" in entries:
                weights[number].copy_(entries["master"])
        return drop_masters(saved)

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)


def build_adamw_8bit(parameters: list[Tensor], **options) -> Optimizer:
    """torchao's AdamW with block-wise 8-bit moments; its state dict holds tensors and numbers."""
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f"train.optimizer: adamw8bit needs torchao ({error}); pip install 'hiper_fast[8bit]'"
        ) from error

    def flatten(_, saved: dict) -> dict:
        """exp_avg -> exp_avg.codes, .scale, .qmap; the learning rate, a tensor, -> a number."""
        return convert(saved, split, float)

    def split(entries: dict) -> dict:
        flat = {}
        for key, value in entries.items():
            parts = OptimState8bit.tensor_attrs if isinstance(value, OptimState8bit) else ()
            flat |= {f"{key}.{part}": getattr(value, part) for part in parts} or {key: value}
        return flat

    def unflatten(_, saved: dict) -> dict:
        return convert(saved, join, torch.tensor)

    def join(flat: dict) -> dict:
        entries = {key: value for key, value in flat.items() if "." not in key}
        for key in sorted({key.partition(".")[0] for key in flat.keys() - entries.keys()}):
            parts = [flat[f"{key}.{part}"] for part in OptimState8bit.tensor_attrs]
            signed = key == "exp_avg"
            entries[key] = OptimState8bit(*parts, signed=signed, dtype=torch.float32)
        return entries

    optimizer = AdamW8bit(parameters, **options)
    optimizer.register_state_dict_post_hook(flatten)
    optimizer.register_load_state_dict_pre_hook(unflatten)
    return optimizer


def convert(saved: dict, change_entries: Callable, change_lr: Callable) -> dict:
    """A state dict, each parameter's entries and each group's learning rate changed."""
    state = {i: change_entries(entries) for i, entries in saved["state"].items()}
    groups = [group | {"lr": change_lr(group["lr"])} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}
