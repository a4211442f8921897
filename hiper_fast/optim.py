"""AdamW as the options ask: float32 master weights, 8-bit states, or masters and states in the CPU's memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from hiper_fast.config import Config, ConfigError, TrainConfig
from hiper_fast.policy import Agent


def build(agent: Agent, config: Config) -> dict[str, Optimizer]:
    """An optimiser each for the policy and for the critic."""
    options = {"betas": (0.9, config.train.beta2), "eps": config.train.eps}
    optimizers = {
        "policy": adamw(agent.model.parameters(), config.train, **options),
        "critic": adamw(agent.critic.parameters(), config.train, **options),
    }
    if agent.world.size > 1 and agent.config.dtype == "bfloat16":
        for optimizer in optimizers.values():
            store_masters(optimizer)
    return optimizers


MUON = 8.0  # its learning rate over AdamW's


def imitation(agent: Agent, config: TrainConfig) -> list[tuple[Optimizer, float]]:
    """The warm start's optimisers, each with its share of the learning rate: AdamW, and Muon for the matrices of the
    tiny model, which from random weights learns to copy in fewer steps with it."""
    embedding = agent.model.get_input_embeddings().weight
    parameters = list(agent.model.parameters())
    matrices = [p for p in parameters if agent.tiny and p.dtype == torch.float32 and p.ndim == 2 and p is not embedding]
    rest = [p for p in parameters if all(p is not m for m in matrices)]
    optimizers = [(adamw(rest, config, betas=(0.9, 0.98)), 1.0)]
    if matrices:
        optimizers.append((Muon(matrices, weight_decay=config.weight_decay), MUON))
    return optimizers


def adamw(
    parameters: Iterable[nn.Parameter], config: TrainConfig, betas: tuple[float, float], eps: float = 1e-8
) -> Optimizer:
    """AdamW over those parameters that train; `set_lr` gives it its learning rate.

    Weights in bfloat16 get float32 masters and gradients unless `train.master_weights` is off. Float32 weights (and
    so FSDP's float32 shards) are masters themselves. `offload` keeps masters and states of GPU weights on the CPU.
    """
    parameters = [p for p in parameters if p.requires_grad]
    offload = config.optimizer == "offload"
    masters = [
        p.detach().to(
            "cpu" if offload else p.device, torch.float32 if config.master_weights else p.dtype, non_blocking=True
        )
        for p in parameters
    ]
    if config.optimizer == "adamw8bit":
        make = adamw_8bit
    else:
        make = functools.partial(AdamW, fused=offload or any(m.is_cuda for m in masters) or None)
    make = functools.partial(make, betas=betas, eps=eps, weight_decay=config.weight_decay)
    same = all(m.dtype == p.dtype and m.device == p.device for p, m in zip(parameters, masters, strict=True))
    return make(parameters) if same else MasterWeights(parameters, masters, make)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class MasterWeights(Optimizer):
    """Steps `masters` (float32, perhaps on the CPU) with what `make` builds and rounds them into the weights.

    Small updates that bfloat16 weights would round away add up in the masters. Gradients are float32 too, so they
    also add up over microbatches. `state_dict` holds each master beside its moments.
    """

    def __init__(self, parameters: list[nn.Parameter], masters: list[Tensor], make: Callable[..., Optimizer]):
        self.masters = masters
        self.inner = make(masters)
        super().__init__(parameters, self.inner.defaults)
        self.param_groups[0]["lr"] = self.inner.param_groups[0]["lr"]
        for p, master in zip(parameters, masters, strict=True):
            p.grad_dtype = master.dtype
        self.offloaded = any(p.device != master.device for p, master in zip(parameters, masters, strict=True))
        self._wait()

    def _wait(self) -> None:
        """Until what is on its way to the CPU has arrived."""
        if self.offloaded:
            torch.cuda.synchronize()

    @torch.no_grad()
    def step(self) -> None:
        weights = self.param_groups[0]["params"]
        for p, master in zip(weights, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.device, master.dtype, non_blocking=True)
        self._wait()
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for p, master in zip(weights, self.masters, strict=True):
            p.copy_(master, non_blocking=True)
            master.grad = None

    def state_dict(self) -> dict:
        return with_masters(self.inner.state_dict(), self.masters)

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Masters that were not stored (of weights never stepped, say) start from the weights."""
        for i, (p, master) in enumerate(zip(self.param_groups[0]["params"], self.masters, strict=True)):
            master.copy_(saved["state"].get(i, {}).get("master", p))
            p.copy_(master)
        self.inner.load_state_dict(without_masters(saved))
        self.param_groups[0]["lr"] = self.inner.param_groups[0]["lr"]


def with_masters(saved: dict, masters: list[Tensor]) -> dict:
    """A state dict that holds each master beside its moments."""
    return saved | {"state": {i: entries | {"master": masters[i]} for i, entries in saved["state"].items()}}


def without_masters(saved: dict) -> dict:
    moments = {i: {k: v for k, v in entries.items() if k != "master"} for i, entries in saved["state"].items()}
    return saved | {"state": moments}


def store_masters(optimizer: Optimizer) -> None:
    """Has the state dict of FSDP's float32 shards hold them as masters: `MasterWeights` in one process reads those."""

    def parameters() -> list[nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def add(_, saved: dict) -> dict:
        return with_masters(saved, [p.detach() for p in parameters()])

    @torch.no_grad()
    def take(_, saved: dict) -> dict:
        weights = parameters()
        for i, entries in saved["state"].items():
            if "master" in entries:
                weights[i].copy_(entries["master"])
        return without_masters(saved)

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)


def adamw_8bit(parameters: list[Tensor], **options) -> Optimizer:
    """torchao's AdamW with block-wise 8-bit moments; its state dict holds plain tensors and numbers."""
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f"train.optimizer: adamw8bit needs torchao ({error}); pip install 'hiper_fast[8bit]'"
        ) from error

    def flatten(optimizer: Optimizer, saved: dict) -> dict:
        """exp_avg -> exp_avg.codes, .scale, .qmap; the learning rate, a tensor there, -> a number."""
        state = {}
        for i, entries in saved["state"].items():
            state[i] = {}
            for key, value in entries.items():
                if isinstance(value, OptimState8bit):
                    state[i] |= {f"{key}.{part}": getattr(value, part) for part in OptimState8bit.tensor_attrs}
                else:
                    state[i][key] = value
        return {"state": state, "param_groups": [g | {"lr": float(g["lr"])} for g in saved["param_groups"]]}

    def unflatten(optimizer: Optimizer, saved: dict) -> dict:
        state = {}
        for i, entries in saved["state"].items():
            state[i] = {k: v for k, v in entries.items() if "." not in k}
            for key in {k.partition(".")[0] for k in entries if "." in k}:
                parts = [entries[f"{key}.{part}"] for part in OptimState8bit.tensor_attrs]
                state[i][key] = OptimState8bit(*parts, signed=key == "exp_avg", dtype=torch.float32)
        return {"state": state, "param_groups": [g | {"lr": torch.tensor(g["lr"])} for g in saved["param_groups"]]}

    optimizer = AdamW8bit(parameters, **options)
    optimizer.register_state_dict_post_hook(flatten)
    optimizer.register_load_state_dict_pre_hook(unflatten)
    return optimizer
