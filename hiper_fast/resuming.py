"""Going on with a run: from which checkpoint, with which options, and what of its files must be as it was."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from hiper_fast import configure
from hiper_fast.config import Config
from hiper_fast.options import ConfigError, Setting, flatten, list_local
from hiper_fast.runs import checkpoint, report
from hiper_fast.runs.checkpoint import CheckpointError
from hiper_fast.runs.folder import CHECKPOINT_CONFIG, CONFIG, find_run_folder
from hiper_fast.runs.metrics import find_damage, read_metrics

METRICS = "metrics.jsonl"
LAST = "plan."  # the section with which every file of options ends
# Options without which the games, the words between them and the policy, or the stored networks were others.
ANOTHER_RUN = (
    *("env.", "run.seed", "agent.style", "agent.subgoals", "advantage.estimator", "warm_start."),
    *("model.path", "model.dtype", "model.critic", "model.lora_"),
    *("train.optimizer", "train.master_weights"),
)
OF_THIS_CALL = ("run.name", "run.folder", "run.resume", "plan.")  # resume_from too


def spell_resume(config: Config, *options: str) -> str:
    """The command that goes on with the run."""
    folder = [] if config.run.folder == "runs" else ["--run.folder", config.run.folder]
    command = ["python", "-m", "hiper_fast.train", "--resume", "--name", config.run.name]
    return shlex.join([*command, *folder, *options])


def find_start(config: Config, folder: Path) -> Path | None:
    """The checkpoint that the run goes on from, None if it has none yet. ConfigError if the chosen one is not there."""
    place, step = folder / "checkpoints", config.run.resume_from
    if step is None:
        return checkpoint.latest(place)
    found = checkpoint.find_step(place, step)
    if found is None:
        steps = checkpoint.list_steps(place)
        there = f"it has those of {', '.join(map(str, steps))}" if steps else "it has none"
        raise ConfigError(f"run.resume_from: {folder} has no checkpoint of update {step}; {there}")
    return found


def tell_finished(config: Config) -> str | None:
    """That a resumed run has made all its updates, and how it goes further; None if it has not."""
    folder = find_run_folder(config)
    saved = find_start(config, folder)
    done = checkpoint.step_of(saved) if saved else -1
    if done < config.train.updates:
        return None
    config.run.name = folder.name
    report.build(folder)  # a kill may have left it behind
    further = spell_resume(config, "--updates", str(2 * done or 1))
    return (
        f"{folder} is finished, after {done} updates; to go further, as to twice as many: {further}"
    )


def tell_stop(config: Config) -> str:
    """Where a run that was stopped stands, and how it goes on."""
    folder = Path(config.run.folder, config.run.name)
    if saved := checkpoint.latest(folder / "checkpoints"):
        step = checkpoint.step_of(saved)
        return f"stopped; update {step} is saved; go on with: {spell_resume(config)}"
    if (folder / CONFIG).exists():
        return f"stopped before its first checkpoint; it begins anew with: {spell_resume(config)}"
    return "stopped before the run began; nothing was written"


@contextlib.contextmanager
def naming_others(saved: Path | None) -> Iterator[None]:
    """Within, an error that asks for another checkpoint than `saved` says which there is."""
    try:
        yield
    except CheckpointError as error:
        others = checkpoint.list_steps(saved.parent) if saved else []
        others = [step for step in others if step != checkpoint.step_of(saved)]
        if not others or not str(error).endswith("use another checkpoint"):
            raise
        raise CheckpointError(f"{error}, as with --run.resume_from {others[-1]}") from error


def list_changes(config: Config, folder: Path, saved: Path | None) -> list[str]:
    """The options that differ from those with which the run went so far, in words.

    ConfigError for those that would make it another run, and for a config.yaml that was cut short.
    """
    file = folder / CONFIG
    copy = saved / CHECKPOINT_CONFIG if saved else file
    stands = configure.read_run(folder)
    before = _read_options(copy) if copy.is_file() else stands
    if _is_cut(before) and saved:
        raise CheckpointError(f"{copy} was cut short; use another checkpoint")
    if _is_cut(stands):
        raise ConfigError(
            f"{file} was cut short: copy {CHECKPOINT_CONFIG} of one of the run's checkpoints over it"
        )
    was, now = flatten(configure.resolve(own=before)), flatten(config)
    local = list_local(config)
    changed = [
        name
        for name in now
        if now[name] != was.get(name) and name not in local and not name.startswith(OF_THIS_CALL)
    ]
    for name in changed:
        begun = saved or not name.startswith("warm_start.")
        if name.startswith(ANOTHER_RUN) and begun:
            raise ConfigError(
                f"{name}: the run {folder} has {was.get(name)}, not {now[name]}, which would make it another; leave it "
                f"out, or start a new run from its checkpoint: --model {saved or folder}"
            )
    return [f"{name} {now[name]} instead of {was.get(name)}" for name in changed]


def _read_options(file: Path) -> list[Setting]:
    try:
        return list(configure.read_file(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from None


def _is_cut(settings: list[Setting]) -> bool:
    return not any(name.startswith(LAST) for _, name, _ in settings)


def check_metrics(folder: Path, step: int) -> None:
    """CheckpointError unless metrics.jsonl has all updates until `step`; a run may go on without the file."""
    if damage := find_damage(folder / METRICS, step):
        raise CheckpointError(
            f"{folder / METRICS}: {damage}; put a copy of it back, or delete it: the run then goes on without its past"
        )


def set_aside(folder: Path, step: int) -> Path | None:
    """Moves what the run has from after `step` into a folder until-<its last step>; None if there is nothing."""
    later = [s for s in checkpoint.list_steps(folder / "checkpoints") if s > step]
    rows = [row["step"] for row in read_metrics(folder / METRICS) if row["stage"] != "warm_start"]
    last = max([*rows, *later], default=step)
    if last <= step:
        return None
    place = _make_place(folder / f"until-{last:06d}")
    if (folder / METRICS).exists():
        shutil.copy2(folder / METRICS, place / METRICS)
    for kind in ("checkpoints", "episodes"):
        (place / kind).mkdir()
        for path in sorted((folder / kind).glob("step-*"), reverse=True):
            if int(path.stem.removeprefix("step-")) > step:
                path.rename(place / kind / path.name)
    return place


def _make_place(place: Path) -> Path:
    for name in (place, *(place.with_name(f"{place.name}-{i}") for i in range(2, 1000))):
        if not name.exists():
            name.mkdir()
            return name
    raise ConfigError(f"run.resume_from: {place} and its like are taken; remove some")


def save_reference(model: nn.Module, file: Path) -> str:
    """Writes the policy to which the KL term refers, whole or not at all; returns the file's checksum."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_model(model, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return _measure(file)


def load_reference(model: nn.Module, file: Path, state: dict[str, Any]) -> None:
    """Gives `model` the weights of `save_reference`. CheckpointError if they are not those."""
    mend = "put a copy of it back, or go on without the KL term: --train.kl_coef 0"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing, the policy to which the KL term refers; {mend}")
    if "reference" in state and _measure(file) != state["reference"]:
        raise CheckpointError(f"{file} is not as the run wrote it; {mend}")
    try:
        load_model(model, file)
    except (SafetensorError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not this model's reference: {why}; {mend}") from None


def _measure(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(2**20):
            digest.update(part)
    return digest.hexdigest()
