"""Checkpoints: whole or not there at all.

`folder/step-000010/` holds the policy in Hugging Face layout at its root (it loads with
`AutoModelForCausalLM.from_pretrained`; with LoRA it is peft's adapter folder), `critic.safetensors`,
`optimizer.safetensors` with `optimizer.json`, and `state.json`. Nothing is pickled. A checkpoint is
written to a hidden sibling, flushed to disk and renamed, so a killed or failed save never touches an
older one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEST = "best.json"
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
    keep: int = 2,
) -> Path:
    """Write `folder/step-{step:06d}` and return it; then prune to the `keep` newest and the best.

    `state` is any JSON-able dict; the random states of python, numpy and torch are stored beside it.
    Raises CheckpointError when writing fails (a full disk, say): older checkpoints are then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    try:
        state_text = json.dumps({"step": step, "state": state, "rng": capture_rng()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"state must hold JSON-able values only: {error}") from error

    folder = Path(folder)
    target = _path(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        with _quiet_transformers():
            policy.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        if critic is not None:
            _write_tensors(temporary / "critic.safetensors", _own_tensors(critic))
        tensors, scalars = _split_optimizers(optimizers)
        _write_tensors(temporary / "optimizer.safetensors", tensors)
        (temporary / "optimizer.json").write_text(json.dumps(scalars))
        (temporary / "state.json").write_text(state_text)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        _put_in_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"could not write checkpoint {target}: {error}. Older checkpoints are untouched; "
            "free some disk space or choose another run folder, then resume"
        ) from error
    _prune(folder, keep)
    return target


def load(
    path: str | Path,
    *,
    policy: PreTrainedModel,
    critic: nn.Module | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Restore `policy`, `critic`, `optimizers` and the random states in place; return `state` with "step".

    Everything is read and checked before the first weight changes, so a CheckpointError (missing, corrupt or
    foreign file, wrong shape) leaves all of them as they were.
    """
    path = Path(path)
    optimizers = optimizers or {}
    _sweep(path.parent)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: give a step-…… folder of a run's checkpoints")

    saved = _read_json(path / "state.json", {"step", "state", "rng"})
    policy_tensors = _read_policy(path, policy)
    critic_tensors = _read_tensors(path / "critic.safetensors") if critic is not None else {}
    if critic is not None:
        _check_shapes(path / "critic.safetensors", critic_tensors, _own_tensors(critic))
    optimizer_states = _read_optimizers(path, optimizers) if optimizers else {}

    _load_policy(policy, policy_tensors)
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
    """The checkpoint marked best, or None."""
    step = _best_step(Path(folder))
    return None if step is None else _path(Path(folder), step)


def step_of(path: str | Path) -> int:
    """The step of a checkpoint folder, from its name."""
    name = Path(path).name
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path} is no checkpoint: its name must be like step-000010")
    return int(name.removeprefix("step-"))


def mark_best(folder: str | Path, step: int) -> None:
    """Record `step` as the best checkpoint: `best` finds it and pruning spares it."""
    folder = Path(folder)
    if not _path(folder, step).is_dir():
        raise CheckpointError(f"cannot mark step {step} as best: {_path(folder, step)} does not exist; save it first")
    temporary = folder / f".{BEST}.tmp"
    try:
        temporary.write_text(json.dumps({"step": step}))
        _fsync(temporary)
        temporary.replace(folder / BEST)
        _fsync(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {folder / BEST}: {error}. Free some disk space") from error


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


def _read_optimizers(path: Path, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, dict[str, Any]]:
    file = path / "optimizer.safetensors"
    tensors = _read_tensors(file)
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


def _load_policy(policy: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    if hasattr(policy, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy, tensors)
    else:
        policy.load_state_dict(tensors)


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


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; use another checkpoint")
    try:
        return load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error


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
    if not (folder / BEST).exists():
        return None
    step = _read_json(folder / BEST, {"step"})["step"]
    return step if _path(folder, step).is_dir() else None


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, because safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, file)


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
