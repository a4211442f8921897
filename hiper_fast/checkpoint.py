"""Checkpoints: whole or not there at all.

`folder/step-000010/` holds the policy in Hugging Face layout at its root (it loads with
`AutoModelForCausalLM.from_pretrained`; with LoRA it is peft's adapter folder), `critic.safetensors`,
`optimizer.safetensors` with `optimizer.json`, and `state.json`. Where many processes train, `critic/` and `optimizer/`
stand for the two files, a safetensors file in them for each process's part; any number of processes reads either.
Nothing is pickled. A checkpoint is written to a hidden sibling, flushed to disk and renamed, so a killed or failed
save never touches an older one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hiper_fast.distributed import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"step-\d{6,}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the mend."""


def save(
    folder: str | Path,
    step: int,
    *,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    critic: nn.Module | None,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Any],
    improved: bool = False,
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Write `folder/step-{step:06d}` and return it; then prune to the `keep` newest and the best.

    `state` is any JSON-able dict; the random states of python, numpy and torch are stored beside it. `improved` makes
    this checkpoint the best one, in the same moment in which it appears. All processes of `world` call this together.
    Raises CheckpointError when writing fails (a full disk, say): older checkpoints are then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state must hold JSON-able values only: {error}") from error

    folder = Path(folder)
    target = _path(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            temporary.mkdir()
        world.wait()
        weights = world.state_dict(policy)
        if world.main:
            with _quiet_transformers():
                policy.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
        if critic is not None:
            _write_tensors(temporary / "critic.safetensors", _own_tensors(critic), world)
        tensors, scalars = _split_optimizers(optimizers)
        _write_tensors(temporary / "optimizer.safetensors", tensors, world)
        if world.main:
            (temporary / "optimizer.json").write_text(json.dumps(scalars))
            content = {
                "step": step,
                "best": step if improved else _best_step(folder),
                "state": state,
                "rng": capture_rng(),
                "files": sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*.safetensors")),
            }
            (temporary / "state.json").write_text(json.dumps(content))
            for path in (*temporary.rglob("*"), temporary):
                _fsync(path)
            _put_in_place(temporary, target)
    except BaseException as error:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"could not write checkpoint {target}: {error}. Older checkpoints are untouched; "
            "free some disk space or choose another run folder, then resume"
        ) from error
    if world.main:
        _prune(folder, keep)
    return target


def load(
    path: str | Path,
    *,
    policy: PreTrainedModel,
    critic: nn.Module | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Restore `policy`, `critic`, `optimizers` and the random states in place; return `state` with "step".

    Everything is read and checked before the first weight changes, so a CheckpointError (missing, corrupt or
    foreign file, wrong shape) leaves all of them as they were. All processes of `world` call this together.
    """
    path = Path(path)
    optimizers = optimizers or {}
    if world.main:
        _sweep(path.parent)
    world.wait()
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: give a step-…… folder of a run's checkpoints")

    saved = _read_json(path / "state.json", {"step", "state", "rng"})
    for name in saved.get("files", ()):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; use another checkpoint")
    policy_tensors = _read_policy(path, policy) if world.main else {}
    critic_tensors = {}
    if critic is not None:
        wanted = _own_tensors(critic)
        critic_tensors = _read_tensors(path / "critic.safetensors", wanted.get, world)
        _check_shapes(path / "critic.safetensors", critic_tensors, wanted)
    optimizer_states = _read_optimizers(path, optimizers, world) if optimizers else {}

    _load_policy(policy, policy_tensors, world)
    if critic is not None:
        critic.load_state_dict(critic_tensors, strict=False)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(optimizer_states[name])
    restore_rng(saved["rng"])
    return {**saved["state"], "step": saved["step"]}


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of `folder` (the best one included), or None."""
    steps = _steps(Path(folder))
    return _path(Path(folder), steps[-1]) if steps else None


def best(folder: str | Path) -> Path | None:
    """The checkpoint that was saved as the best, or None."""
    step = _best_step(Path(folder))
    return None if step is None else _path(Path(folder), step)


def step_of(path: str | Path) -> int:
    """The step of a checkpoint folder, from its name."""
    name = Path(path).name
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path} is no checkpoint: its name must be like step-000010")
    return int(name.removeprefix("step-"))


def capture_rng() -> dict[str, Any]:
    """The states of python's, numpy's and torch's (all devices) global generators, JSON-able."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Put back what `capture_rng` took; CUDA states for the devices that exist in both places."""
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = rng["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(rng["torch"]))
    if torch.cuda.is_available():
        for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_decode(state), device)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# Optimizers: tensors go to safetensors under "<optimizer>/<parameter>/<key>", everything else to JSON.


def _split_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        rest: dict[str, dict[str, Any]] = {}
        for parameter, entries in saved["state"].items():
            rest[str(parameter)] = {}
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{parameter}/{key}"] = value
                else:
                    rest[str(parameter)][key] = value
        scalars[name] = {"state": rest, "param_groups": saved["param_groups"]}
    return tensors, scalars


def _read_optimizers(
    path: Path, optimizers: Mapping[str, torch.optim.Optimizer], world: World
) -> dict[str, dict[str, Any]]:
    file = path / "optimizer.safetensors"
    parameters = {
        f"{name}/{index}": parameter
        for name, optimizer in optimizers.items()
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    tensors = _read_tensors(file, lambda name: parameters.get(name.rpartition("/")[0]), world)
    scalars = _read_json(path / "optimizer.json", set(optimizers))
    states: dict[str, dict[str, Any]] = {
        name: {
            "state": {int(parameter): dict(entries) for parameter, entries in scalars[name]["state"].items()},
            "param_groups": scalars[name]["param_groups"],
        }
        for name in optimizers
    }
    for full_name, tensor in tensors.items():
        name, parameter, key = full_name.rsplit("/", 2)
        if name in states:
            states[name]["state"].setdefault(int(parameter), {})[key] = tensor

    for name, optimizer in optimizers.items():
        groups = states[name]["param_groups"]
        ours = [len(group["params"]) for group in optimizer.param_groups]
        theirs = [len(group["params"]) for group in groups]
        if ours != theirs:
            raise CheckpointError(
                f"{path / 'optimizer.json'}: optimizer {name!r} was saved with {theirs} parameters per group "
                f"and has {ours} here; resume with the run's own config"
            )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, entries in states[name]["state"].items():
            for key, value in entries.items():
                whole = isinstance(value, Tensor) and value.ndim and "." not in key  # not a part of an 8-bit state
                if whole and value.shape != parameters[index].shape:
                    raise CheckpointError(
                        f"{file}: {key} of parameter {index} of optimizer {name!r} has shape "
                        f"{tuple(value.shape)}, expected {tuple(parameters[index].shape)}; "
                        "resume with the run's own config"
                    )
        # JSON knows no tuples; AdamW's betas are one.
        for group, current in zip(groups, optimizer.param_groups, strict=True):
            for key, value in group.items():
                if isinstance(value, list) and isinstance(current.get(key), tuple):
                    group[key] = tuple(value)
    return states


# Reading and checking.


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen weights: a critic with LoRA shares those with the policy."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _read_policy(path: Path, policy: PreTrainedModel) -> dict[str, Tensor]:
    """The stored state dict, through `from_pretrained`, which knows of tied, sharded and renamed weights.

    With LoRA the adapters alone.
    """
    if hasattr(policy, "peft_config"):
        file = path / "adapter_model.safetensors"
        tensors = {name.removeprefix("base_model.model."): t for name, t in _read_tensors(file).items()}
        _check_shapes(file, tensors, policy.get_adapter_state_dict())
        return tensors
    if not (path / "config.json").is_file() or not any(path.glob("model*.safetensors")):
        raise CheckpointError(
            f"{path} holds no policy: config.json or model.safetensors is missing; use another checkpoint"
        )
    try:
        with _quiet_transformers():
            stored, info = type(policy).from_pretrained(
                path,
                dtype=policy.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"cannot read the policy in {path}: {error}; use another checkpoint") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{path}: the policy lacks {', '.join(sorted(info['missing_keys'])[:3])}; use another checkpoint"
        )
    tensors = stored.state_dict()
    _check_shapes(path / "model.safetensors", tensors, policy.state_dict())
    return tensors


def _load_policy(policy: PreTrainedModel, tensors: dict[str, Tensor], world: World) -> None:
    if hasattr(policy, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy, tensors)
    else:
        world.load_state_dict(policy, tensors)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_shapes(file: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = sorted(stored.keys() ^ wanted.keys())
    if different:
        raise CheckpointError(
            f"{file} belongs to another model: {', '.join(different[:3])} only on one side; "
            "resume with the run's own config"
        )
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}; "
                "resume with the run's own config"
            )


def _read_tensors(file: Path, like: Callable[[str], Tensor | None] = {}.get, world: World = ALONE) -> dict[str, Tensor]:
    """The tensors of `file`, or of the folder that stands for it; each is spread as `like(name)`, of its shape, is."""
    folder = file.with_suffix("")
    files = sorted(folder.glob("*.safetensors")) or [file]
    if not files[0].is_file():
        raise CheckpointError(f"{file} is missing; use another checkpoint")
    try:
        return load_file(file) if world.size == 1 and files == [file] else _read_parts(files, like, world)
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error


def _read_parts(files: list[Path], like: Callable[[str], Tensor | None], world: World) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_parts

    def room(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        sample = like(name)
        if sample is not None and sample.shape == shape:
            return torch.empty_like(sample, dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs.ls = lambda folder: [str(file) for file in files]
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: room(name, entry.size, entry.properties.dtype) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process: that it is alone
        load_parts(tensors, storage_reader=reader, no_dist=world.size == 1)
    return tensors


def _read_json(file: Path, keys: set[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; use another checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error
    missing = keys - content.keys() if isinstance(content, dict) else keys
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}; use another checkpoint")
    return content


# Files and folders.


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _steps(folder: Path) -> list[int]:
    _recover(folder)
    return sorted(step_of(path) for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _best_step(folder: Path) -> int | None:
    """As the newest checkpoint knows it, so that it always names one that is there."""
    newest = latest(folder)
    step = _read_json(newest / "state.json", {"step"}).get("best") if newest else None
    return None if step is None or not _path(folder, step).is_dir() else step


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    if world.size == 1:
        # Copies, because safetensors refuses tensors that share memory.
        save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, file)
    else:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from torch.distributed.checkpoint import save as save_parts

        writer = HuggingFaceStorageWriter(str(file.with_suffix("")), save_distributed=True)
        save_parts(dict(tensors), storage_writer=writer)


def _put_in_place(temporary: Path, target: Path) -> None:
    former = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(former)
    try:
        temporary.rename(target)
    except OSError:
        _recover(target.parent)
        raise
    _fsync(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Give back a checkpoint that was moved aside by a save of the same step that never finished."""
    for former in folder.glob(".step-*.old"):
        target = folder / former.name.removeprefix(".").removesuffix(".old")
        if not target.exists():
            former.rename(target)


def _sweep(folder: Path) -> None:
    """Remove what a killed save left behind."""
    _recover(folder)
    for pattern in (".step-*.tmp", ".step-*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _prune(folder: Path, keep: int) -> None:
    spared = {*_steps(folder)[-keep:], _best_step(folder)}
    for step in _steps(folder):
        if step not in spared:
            # Hidden first, so that a kill while removing never leaves half a checkpoint that looks whole.
            doomed = _path(folder, step).rename(folder / f".step-{step:06d}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
