"""Where a run keeps its files."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import yaml

from hiper_fast.config import Config
from hiper_fast.options import ConfigError

CONFIG = "config.yaml"
CHECKPOINT_CONFIG = "hiper_fast.yaml"  # the same in a checkpoint, which may be moved elsewhere
MOST_RUNS = 999  # that may share an automatic name


def replace_text(file: Path, text: str, *, errors: str = "strict") -> Path:
    """Writes the file whole or not at all, in UTF-8: a kill or a full disk leaves what was there."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors=errors)
        return temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def find_run_folder(config: Config) -> Path:
    """The run's folder: a new one, or with `run.resume` the existing one that is meant.

    An automatic name is <environment>-seed<seed>, numbered when taken; resuming takes the newest.
    """
    root, name = Path(config.run.folder), config.run.name
    environment = re.sub(r"\W+", "-", config.env.name)  # my_module:Family
    stem = f"{environment}-seed{config.run.seed}"
    numbered = [f"{stem}-{i}" for i in range(2, MOST_RUNS + 1)]
    names = [name] if name != "auto" else [stem, *numbered]
    if config.run.resume:
        taken = [root / n for n in names if (root / n / CONFIG).exists()]
        if not taken:
            raise ConfigError(f"--resume: {explain_missing(root / names[0])}")
        return taken[-1]
    free = next((root / n for n in names if not (root / n).exists()), None)
    if free is None:
        raise ConfigError(
            f"--name: the run {root / name} exists; "
            "continue it with --resume, or choose another name"
        )
    return free


def explain_missing(folder: Path) -> str:
    """Why a run cannot be continued whose configuration is not there, and what to do."""
    if any(folder.glob(f"checkpoints/*/{CHECKPOINT_CONFIG}")):
        return f"{folder / CONFIG} is missing: copy {CHECKPOINT_CONFIG} of one of the run's checkpoints there"
    return f"there is no run {folder}; leave --resume out to start it, or give --name"


def make_run_folder(config: Config) -> Path:
    """Makes a new run's folder; of runs that begin in the same moment each gets its own."""
    while True:
        folder = find_run_folder(config)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def find_config(checkpoint: Path) -> Path | None:
    """The checkpoint's own configuration, else that of the run in which it lies; None without either."""
    checkpoint = checkpoint.resolve()
    files = checkpoint / CHECKPOINT_CONFIG, checkpoint.parent.parent / CONFIG
    return next((file for file in files if file.exists()), None)


def write_config(config: Config, folder: Path) -> None:
    """Writes the resolved configuration into the run's folder."""
    replace_text(folder / CONFIG, format_config(config))


def format_config(config: Config) -> str:
    """The configuration as YAML; its readers do not resume."""
    content = dataclasses.asdict(config)
    content["run"] |= {"resume": False, "resume_from": None}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
