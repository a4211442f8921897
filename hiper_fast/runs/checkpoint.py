"""Checkpoints: whole or not there at all.

`folder/step-000010/` holds the policy in Hugging Face layout at its root (it loads with
`AutoModelForCausalLM.from_pretrained`; with LoRA it is peft's adapter folder), and beside it
`critic.safetensors`, `optimizer.safetensors` with `optimizer.json`, `state.json`, and what texts a
run gives it: its model card and configuration. Where many processes train, `critic/` and
`optimizer/` stand for the two files, a safetensors file in them for each process's part; any number
of processes reads either. Nothing is pickled. A checkpoint is written to a hidden sibling, flushed
to disk and renamed, so a killed or failed save never touches an older one.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiper_fast.agent.runtime import silence_transformers
from hiper_fast.distributed import ALONE, World
from hiper_fast.runs.tensors import (
    NAMES_SHOWN,
    CheckpointError,
    check_shapes,
    read_json,
    read_optimizers,
    read_tensors,
    select_own_tensors,
    split_optimizers,
    write_tensors,
)

MEASURED = 2**20  # bytes at each end of a file
_NAME = re.compile(r"step-\d{6,}")


def save(
    folder: str | Path,
    step: int,
    *,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    critic: nn.Module | None,
    optimizers: Mapping[str, Optimizer],
    state: dict[str, Any],
    texts: Mapping[str, str] | None = None,
    improved: bool = False,
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Write `folder/step-{step:06d}` and return it; then prune to the `keep` newest and the best.

    `state` is any JSON-able dict; beside it are stored python's, numpy's and torch's random states, and
    the main process's `texts`: file name -> content. `improved` makes this checkpoint the best one, in
    the same moment in which it appears. All processes of `world` call this together. Raises
    CheckpointError when writing fails (a full disk, say): older checkpoints are then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state must hold JSON-able values only: {error}") from error

    folder = Path(folder)
    target = _build_path(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            temporary.mkdir()
        world.wait()
        _write_policy(temporary, policy, tokenizer, texts or {}, world)
        if critic is not None:
            write_tensors(temporary / "critic.safetensors", select_own_tensors(critic), world)
        tensors, rest = split_optimizers(optimizers)
        write_tensors(temporary / "optimizer.safetensors", tensors, world)
        if world.main:
            (temporary / "optimizer.json").write_text(json.dumps(rest))
            best_step = step if improved else _read_best_step(folder)
            _write_state(temporary, {"step": step, "best": best_step, "state": state})
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
    optimizers: Mapping[str, Optimizer] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Restore `policy`, `critic`, `optimizers`, random states in place; return `state` with "step".

    Everything is read and checked before the first weight changes, so a CheckpointError (missing,
    corrupt or foreign file, wrong shape) leaves all of them as they were. All processes of `world`
    call this together.
    """
    path = Path(path)
    optimizers = optimizers or {}
    if world.main:
        _sweep(path.parent)
    world.wait()
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint at {path}: give a step-…… folder of a run's checkpoints"
        )

    saved = _read_state_file(path)
    _check_files(path, saved.get("files") or {})
    policy_tensors = _read_policy(path, policy) if world.main else {}
    critic_tensors = {}
    if critic is not None:
        wanted = select_own_tensors(critic)
        file = path / "critic.safetensors"
        critic_tensors = read_tensors(file, wanted.get, world)
        check_shapes(file, critic_tensors, wanted)
    optimizer_states = read_optimizers(path, optimizers, world) if optimizers else {}

    _restore_saved_rng(path / "state.json", saved["rng"])

    _load_policy(policy, policy_tensors, world)
    if critic is not None:
        critic.load_state_dict(critic_tensors, strict=False)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(optimizer_states[name])
    return {**saved["state"], "step": saved["step"]}


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of `folder` (the best one included), or None."""
    steps = list_steps(folder)
    return _build_path(Path(folder), steps[-1]) if steps else None


def best(folder: str | Path) -> Path | None:
    """The checkpoint that was saved as the best, or None."""
    step = _read_best_step(Path(folder))
    return None if step is None else _build_path(Path(folder), step)


def find(path: str | Path) -> Path:
    """The checkpoint that a folder means: itself, or a run's best, else newest; CheckpointError if that has none."""
    folder = Path(path) / "checkpoints"
    if not folder.is_dir() or (Path(path) / "config.json").exists():  # a model's own
        return Path(path)
    found = best(folder) or latest(folder)
    if found is None:
        raise CheckpointError(f"{path} is a run without a checkpoint yet; give another folder")
    return found


def describe_choice(run: Path, found: Path) -> str:
    """What `find` took of a run, in words."""
    kind = "best" if found == best(run / "checkpoints") else "newest"
    return f"{run}: {found.name}, its {kind} checkpoint"


def find_step(folder: str | Path, step: int) -> Path | None:
    """The checkpoint of `step`, or None."""
    return _build_path(Path(folder), step) if step in list_steps(folder) else None


def list_steps(folder: str | Path) -> list[int]:
    """The steps of all whole checkpoints, in order."""
    _recover(Path(folder))
    names = Path(folder).glob("step-*")
    return sorted(step_of(path) for path in names if _NAME.fullmatch(path.name))


def read_state(path: str | Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with."""
    return _read_state_file(Path(path))["state"]


def step_of(path: str | Path) -> int:
    """The step of a checkpoint folder, from its name."""
    name = Path(path).name
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{path} is no checkpoint: its name must be like step-000010")
    return int(name.removeprefix("step-"))


def capture_rng() -> dict[str, Any]:
    """The states of python's, numpy's and torch's (all devices) generators, JSON-able."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
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


def _restore_saved_rng(file: Path, rng: Any) -> None:
    present = capture_rng()
    try:
        restore_rng(rng)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        restore_rng(present)
        raise CheckpointError(f"{file} is corrupt: rng: {error}; use another checkpoint") from error


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write_policy(
    path: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    world: World,
) -> None:
    weights = world.state_dict(policy)
    if world.main:
        with silence_transformers():
            policy.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)
        for name, text in texts.items():  # after peft, which has a README of its own
            (path / name).write_text(text, encoding="utf-8")


def _write_state(path: Path, content: dict[str, Any]) -> None:
    written = [*path.rglob("*.safetensors"), path / "optimizer.json"]
    files = {str(file.relative_to(path)): _measure(file) for file in sorted(written)}
    content = {**content, "rng": capture_rng(), "files": files}
    (path / "state.json").write_text(json.dumps(content))


def _read_state_file(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    saved = read_json(file, {"step", "state", "rng"})
    if saved["step"] != step_of(path):
        raise CheckpointError(f"{file} is of step {saved['step']}; use another checkpoint")
    for key in {"state", "rng", "files"} & saved.keys():
        if not isinstance(saved[key], dict | list if key == "files" else dict):
            raise CheckpointError(f"{file} is corrupt: {key} is no table; use another checkpoint")
    if not isinstance(saved.get("best"), int | None):
        raise CheckpointError(f"{file} is corrupt: best is no step; use another checkpoint")
    return saved


def _check_files(path: Path, files: Mapping[str, str] | list[str]) -> None:
    """That each is as it was written, as far as its ends tell; older checkpoints have names alone."""
    for name in files:
        file = path / str(name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; use another checkpoint")
        if isinstance(files, dict) and files[name] != _measure(file):
            raise CheckpointError(f"{file} is not as it was written; use another checkpoint")


def _measure(file: Path) -> str:
    """The file's size, and a checksum of its first and last MiB: those of two updates differ, and it takes no time."""
    with file.open("rb") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - MEASURED))
        end = zlib.crc32(content.read())
        content.seek(0)
        return f"{size} {zlib.crc32(content.read(MEASURED), end):08x}"


def _read_policy(path: Path, policy: PreTrainedModel) -> dict[str, Tensor]:
    """The stored state dict; with LoRA the adapters alone."""
    if hasattr(policy, "peft_config"):
        file = path / "adapter_model.safetensors"
        adapters = read_tensors(file)
        tensors = {name.removeprefix("base_model.model."): t for name, t in adapters.items()}
        check_shapes(file, tensors, policy.get_adapter_state_dict())
    else:
        tensors = _read_whole_policy(path, policy)
        check_shapes(path / "model.safetensors", tensors, policy.state_dict())
    return tensors


def _read_whole_policy(path: Path, policy: PreTrainedModel) -> dict[str, Tensor]:
    """Through `from_pretrained`, which knows of tied, sharded and renamed weights."""
    if not (path / "config.json").is_file() or not any(path.glob("model*.safetensors")):
        raise CheckpointError(
            f"{path} holds no policy: config.json or model.safetensors is missing; "
            "use another checkpoint"
        )
    try:
        with silence_transformers():
            stored, info = type(policy).from_pretrained(
                path,
                dtype=policy.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(
            f"cannot read the policy in {path}: {error}; use another checkpoint"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:NAMES_SHOWN])
        raise CheckpointError(f"{path}: the policy lacks {missing}; use another checkpoint")
    return stored.state_dict()


def _load_policy(policy: PreTrainedModel, tensors: dict[str, Tensor], world: World) -> None:
    if hasattr(policy, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy, tensors)
    else:
        world.load_state_dict(policy, tensors)


def _build_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _read_best_step(folder: Path) -> int | None:
    """As the newest checkpoint knows it, so that it always names one that is there."""
    newest = latest(folder)
    step = read_json(newest / "state.json", {"step"}).get("best") if newest else None
    return None if step is None or not _build_path(folder, step).is_dir() else step


def _put_in_place(temporary: Path, target: Path) -> None:
    """Flush the checkpoint to disk; then let it appear, whole."""
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
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
    """Give back a checkpoint that an unfinished save of the same step moved aside."""
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
    spared = {*list_steps(folder)[-keep:], _read_best_step(folder)}
    for step in list_steps(folder):
        if step not in spared:
            # Hidden first: a kill while removing never leaves half a checkpoint that looks whole.
            doomed = _build_path(folder, step).rename(folder / f".step-{step:06d}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
