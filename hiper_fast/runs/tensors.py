"""The files of a checkpoint: tensors as safetensors, what else optimisers hold as JSON.

Where many processes write, a folder with a part of each stands for a file; any number reads both.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hiper_fast.distributed import ALONE, World
from hiper_fast.text import PlainError

NAMES_SHOWN = 3  # in an error message


class CheckpointError(PlainError, RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the mend."""


def select_own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen weights: a critic with LoRA shares those with the policy."""
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    if world.size == 1:
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        save_file(copies, file)
    else:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        writer = HuggingFaceStorageWriter(str(file.with_suffix("")), save_distributed=True)
        save(dict(tensors), storage_writer=writer)


def read_tensors(
    file: Path, like: Callable[[str], Tensor | None] = {}.get, world: World = ALONE
) -> dict[str, Tensor]:
    """The tensors of `file`, or of the folder that stands for it.

    Each is spread over the processes as `like(name)`, if that has its shape.
    """
    files = sorted(file.with_suffix("").glob("*.safetensors")) or [file]
    if not files[0].is_file():
        raise CheckpointError(f"{file} is missing; use another checkpoint")
    try:
        if world.size == 1 and files == [file]:
            return load_file(file)
        return _read_parts(files, like, world)
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error


def _read_parts(
    files: list[Path], like: Callable[[str], Tensor | None], world: World
) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    def make_room(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        sample = like(name)
        if sample is not None and sample.shape == shape:
            return torch.empty_like(sample, dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs.ls = lambda folder: [str(file) for file in files]
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: make_room(name, entry.size, entry.properties.dtype) for name, entry in stored.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process: that it is alone
        load(tensors, storage_reader=reader, no_dist=world.size == 1)
    return tensors


def check_shapes(file: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = sorted(stored.keys() ^ wanted.keys())
    if different:
        raise CheckpointError(
            f"{file} belongs to another model: {', '.join(different[:NAMES_SHOWN])} "
            "only on one side; resume with the run's own config"
        )
    for name, tensor in wanted.items():
        _check_shape(f"{file}: {name}", stored[name], tensor)


def _check_shape(name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.shape != wanted.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(stored.shape)}, expected {tuple(wanted.shape)}; "
            "resume with the run's own config"
        )


def read_json(file: Path, keys: set[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; use another checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error
    missing = keys - content.keys() if isinstance(content, dict) else keys
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}; use another checkpoint")
    return content


def split_optimizers(
    optimizers: Mapping[str, Optimizer],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, by "<optimizer>/<parameter>/<key>", and what else each optimizer holds."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        rest[name] = {"state": {}, "param_groups": saved["param_groups"]}
        for parameter, entries in saved["state"].items():
            found = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
            tensors |= {f"{name}/{parameter}/{key}": value for key, value in found.items()}
            others = {key: value for key, value in entries.items() if key not in found}
            rest[name]["state"][str(parameter)] = others
    return tensors, rest


def read_optimizers(
    path: Path, optimizers: Mapping[str, Optimizer], world: World
) -> dict[str, dict[str, Any]]:
    """For each optimizer the state that was saved of it, checked against it."""
    parameters: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        parameters |= {f"{name}/{i}": p for i, p in enumerate(_list_parameters(optimizer))}
    file = path / "optimizer.safetensors"
    tensors = read_tensors(file, lambda name: parameters.get(name.rpartition("/")[0]), world)
    rest_file = path / "optimizer.json"
    rest = read_json(rest_file, set(optimizers))
    try:
        states = {name: _join_state(name, tensors, rest[name]) for name in optimizers}
        for name, optimizer in optimizers.items():
            _check_groups(rest_file, name, states[name], optimizer)
            _check_state(file, name, states[name], optimizer)
            _restore_tuples(states[name], optimizer)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{rest_file} is corrupt: {why}; use another checkpoint") from error
    return states


def _list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _join_state(
    optimizer: str, tensors: Mapping[str, Tensor], rest: dict[str, Any]
) -> dict[str, Any]:
    state = {int(parameter): dict(entries) for parameter, entries in rest["state"].items()}
    for full_name, tensor in tensors.items():
        name, parameter, key = full_name.rsplit("/", 2)
        if name == optimizer:
            state.setdefault(int(parameter), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _check_groups(file: Path, name: str, saved: dict[str, Any], optimizer: Optimizer) -> None:
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if ours != theirs:
        raise CheckpointError(
            f"{file}: optimizer {name!r} was saved with {theirs} parameters per group "
            f"and has {ours} here; resume with the run's own config"
        )


def _check_state(file: Path, name: str, saved: dict[str, Any], optimizer: Optimizer) -> None:
    parameters = _list_parameters(optimizer)
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            part_of_8_bit_state = "." in key
            if isinstance(value, Tensor) and value.ndim and not part_of_8_bit_state:
                where = f"{file}: {key} of parameter {index} of optimizer {name!r}"
                _check_shape(where, value, parameters[index])


def _restore_tuples(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """JSON knows no tuples; AdamW's betas are one."""
    for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key, value in group.items():
            if isinstance(value, list) and isinstance(current.get(key), tuple):
                group[key] = tuple(value)
        for key, sample in current.items():
            if key != "params" and not _is_like(group.get(key, sample), sample):
                raise ValueError(f"{key} of a parameter group is {group[key]!r}")


def _is_like(value: Any, sample: Any) -> bool:
    """Whether a setting is of the kind that the optimizer has; another machine may choose other flags."""
    if isinstance(sample, bool | None):
        return isinstance(value, bool | None)
    if isinstance(sample, tuple):
        return (
            isinstance(value, tuple)
            and len(value) == len(sample)
            and all(map(_is_like, value, sample))
        )
    return isinstance(value, float | int) and isinstance(sample, float | int | Tensor)
