"""Many processes, started by torchrun: who plays and computes what, and weights sharded over them all (FSDP2).

Each process plays its share of the episodes; then every one of them knows them all, so that rewards, advantages and
their moments are computed as in one process. Only the models' passes are divided: each process takes its share of the
microbatches, and gradients add up. Their denominators are the whole minibatch's, so the sum is one process's gradient.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hiper_fast.config import Config, ConfigError, flatten

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=2)  # for the slowest process's rollout, or the first one's warm start


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; this one is number `rank` of `size`. In a world of one, nothing here costs anything."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and reports."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """This process's part of `items`; all parts, in the order of their processes, are the whole."""
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def gather(self, items: list[T]) -> list[T]:
        """The parts of all processes put together, in each of them."""
        if self.size == 1:
            return items
        parts: list = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def deal(self, items: Iterable[T], blank: T) -> Iterable[T]:
        """Every `size`-th of `items`; all processes get as many, for which some get a `blank`.

        Passes through sharded models wait for each other, so that all processes must make equally many.
        """
        if self.size == 1:
            return items
        items = list(items)
        items += [blank] * (-len(items) % self.size)
        return items[self.rank :: self.size]

    def sum(self, x: Tensor) -> Tensor:
        """`x` added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, which alone calls it; the others wait."""
        if self.size == 1:
            return function()
        value = [function() if self.main else None]
        dist.broadcast_object_list(value)
        return value[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum(torch.zeros(1))

    def copy(self, module: nn.Module) -> None:
        """Gives the weights of the main process's `module` to those of the others."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def shard(self, module: nn.Module, layers: Iterable[nn.Module] = ()) -> nn.Module:
        """Spreads the weights of `module` over the processes, each layer and the rest (embeddings, norm, head) a group.

        Trained weights are kept in float32; those that came in bfloat16 are still computed with in bfloat16.
        Gradients are added up in float32.
        """
        if self.size == 1:
            return module
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = dist.init_device_mesh("cuda" if "nccl" in dist.get_backend_config() else "cpu", (self.size,))
        half = any(p.dtype == torch.bfloat16 for p in module.parameters())
        trained = any(p.requires_grad for p in module.parameters())
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)
        for part in (*layers, module):
            fully_shard(part.float() if trained else part, mesh=mesh, mp_policy=precision)
        for part in units(module):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        if getattr(module, "base_model", module) is not module:  # its head's weight is used apart from its trunk
            module.inside = types.MethodType(lambda self, function: function(), module)
            register_fsdp_forward_method(module, "inside")
        return module

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole state dict of a sharded `module`, in the main process and on the CPU; in the others an empty one.

        Weights are gathered one after the other; a tied one stays one tensor of several names.
        """
        if self.size == 1:
            return module.state_dict()
        gathered: dict[int, Tensor] = {}
        names = module.state_dict(keep_vars=True)
        for tensor in names.values():
            if id(tensor) not in gathered:
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                gathered[id(tensor)] = whole.detach().cpu() if self.main else torch.empty(0)
        return {name: gathered[id(tensor)] for name, tensor in names.items()} if self.main else {}

    @torch.no_grad()
    def load_state_dict(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Loads the main process's whole `state` into a sharded `module`; the others need give none."""
        if self.size == 1:
            module.load_state_dict(state)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, target in module.state_dict().items():
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if self.main:
                whole.copy_(state[name])
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
            else:
                dist.broadcast(whole, 0)
                target.copy_(whole)

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Within, each process holds all of the weights that `shard` spread, and calls `module` as often as it may."""
        parts = units(module) if self.size > 1 else []
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.reshard()  # lest an older copy be taken for the weights of now
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not module, recurse=False)


ALONE = World()


@contextlib.contextmanager
def started(config: Config) -> Iterator[World]:
    """The processes that torchrun started, joined; without torchrun, a world of one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    for option in ("train.episodes", "eval.episodes"):
        if flatten(config)[option] < size:
            raise ConfigError(f"{option}: {size} processes need at least as many; start fewer or raise it")
    if config.model.lora_rank:
        raise ConfigError("model.lora_rank: LoRA trains in one process; leave torchrun out, or train all weights")
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer: {config.train.optimizer} works in one process; several share AdamW's states already: "
            "use adamw"
        )
    cuda = config.model.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), size)
    dist.destroy_process_group()  # not after an error: the others may never come


def units(module: nn.Module) -> list[nn.Module]:
    """The parts of a sharded module whose weights travel together."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def inside(module: nn.Module, function: Callable[[], T]) -> T:
    """`function()`, with the weights of `module` outside its layers, such as the head's, at hand if it is sharded.

    Gradients of what it returns reach them. Without gradients they are given up again, lest they be there, and old,
    after an optimiser step.
    """
    if not hasattr(module, "inside"):
        return function()
    result = module.inside(function)
    if not torch.is_grad_enabled():
        module.reshard()
    return result
