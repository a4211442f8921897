"""Many processes, started by torchrun: who does what; weights sharded over all (FSDP2).

Each process plays its share of the episodes; then every one of them knows them all, so that
rewards, advantages and their moments are computed as in one process. Only the models' passes are
divided: each process takes its share of the microbatches, and gradients add up. Their denominators
are the whole minibatch's, so the sum is one process's gradient.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hiper_fast.config import Config
from hiper_fast.options import ConfigError, flatten

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=2)  # for the slowest rollout, or the first process's warm start


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, this one number `rank` of `size`. With one, nothing here costs."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and reports."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """This process's part of `items`; all parts, in the processes' order, are the whole."""
        begin, end = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def gather(self, items: list[T]) -> list[T]:
        """The parts of all processes put together, in each of them."""
        if self.size == 1:
            return items
        parts: list = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def deal(self, items: Iterable[T], blank: T) -> Iterable[T]:
        """Every `size`-th of `items`; all processes get as many, for which some get a `blank`.

        Passes through sharded models wait for each other, so that all processes must make equally
        many.
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
        """Spreads the weights over the processes, each of `layers` and the rest a group.

        Trained weights are kept in float32; those that came in bfloat16 are still computed with in
        bfloat16. Gradients are added up in float32.
        """
        if self.size == 1:
            return module
        from torch.distributed import fsdp

        kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
        mesh = dist.init_device_mesh(kind, (self.size,))
        half = any(p.dtype == torch.bfloat16 for p in module.parameters())
        trained = any(p.requires_grad for p in module.parameters())
        precision = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        for part in (*layers, module):
            part = part.float() if trained else part
            fsdp.fully_shard(part, mesh=mesh, mp_policy=precision)
        for part in find_units(module):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        if getattr(module, "base_model", module) is not module:  # its head is used by itself
            module.inside = types.MethodType(lambda self, function: function(), module)
            fsdp.register_fsdp_forward_method(module, "inside")
        return module

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole state dict of a sharded `module`, on the main process's CPU; elsewhere {}.

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
        if not self.main:
            return {}
        return {name: gathered[id(tensor)] for name, tensor in names.items()}

    @torch.no_grad()
    def load_state_dict(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Loads the main process's whole `state` into a sharded `module`; others need give none."""
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
        """Within, each process holds all that `shard` spread, and may call `module` by itself."""
        parts = find_units(module) if self.size > 1 else []
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
def start(config: Config) -> Iterator[World]:
    """The processes that torchrun started, joined; without torchrun, a world of one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    for option in ("train.episodes", "eval.episodes"):
        if flatten(config)[option] < size:
            raise ConfigError(
                f"{option}: {size} processes need at least as many; start fewer or raise it"
            )
    if config.model.lora_rank:
        raise ConfigError(
            "model.lora_rank: LoRA trains in one process; leave torchrun out, or train all weights"
        )
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer: {config.train.optimizer} works in one process; several share "
            "AdamW's states already: use adamw"
        )
    cuda = config.model.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), size)
    dist.destroy_process_group()  # not after an error: the others may never come


def leave(status: int) -> NoReturn:
    """Ends this process. One of many goes at once: all it had to do is done and on disk, and what gloo's
    threads and shards still hold when Python takes itself apart has now and then aborted it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def find_units(module: nn.Module) -> list[nn.Module]:
    """The parts of a sharded module whose weights travel together."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def call_whole(module: nn.Module, function: Callable[[], T]) -> T:
    """As `call_inside`, within `World.whole`: nothing is gathered or given up, so each process may call by itself."""
    return module.inside(function) if hasattr(module, "inside") else function()


def call_inside(module: nn.Module, function: Callable[[], T]) -> T:
    """`function()`, with a sharded `module`'s weights outside its layers, as the head's, at hand.

    Gradients of what it returns reach them. Without gradients they are given up again, lest they
    be there, and old, after an optimiser step.
    """
    if not hasattr(module, "inside"):
        return function()
    result = module.inside(function)
    if not torch.is_grad_enabled():
        module.reshard()
    return result
