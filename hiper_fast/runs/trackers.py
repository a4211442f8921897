"""Where a run's rows go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio (`run.track`).

None of them reaches for the network unless its own environment variables say so: wandb is offline without
WANDB_MODE, trackio keeps its database on this machine. Each is imported where a run asks for it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import yaml

from hiper_fast.options import ConfigError
from hiper_fast.runs.folder import replace_text

PROJECT = "hiper_fast"
WARM_START = "warm_start"  # its rows count steps of their own
TABLE, COLUMNS = "eval/table", ("task type", "success", "games", "low", "high")

Row = Mapping[str, Any]
Table = Sequence[
    tuple[str, float, int, float, float]
]  # an evaluation, as of `metrics.list_success`


class Tracker(Protocol):
    """Made of (run_dir, resume_step, options): the folder, the step that a run goes on from, dotted options."""

    def add(self, row: Row) -> None: ...

    def close(self, table: Table, *, failed: bool) -> None:
        """The last evaluation, and whether the run ends by an error."""


def start_trackers(
    names: Iterable[str], run_dir: Path, resume_step: int | None, options: Mapping[str, Any]
) -> dict[str, Tracker]:
    """Name -> tracker; ConfigError for what is not installed or cannot begin."""
    started: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            started[name] = TRACKERS[name](run_dir, resume_step, options)
        except ConfigError:
            raise
        except Exception as error:  # whatever a foreign package raises
            raise ConfigError(f"run.track: {name} cannot begin: {error}") from error
    return started


def check_installed(names: Iterable[str]) -> None:
    """ConfigError, before anything is loaded, for what a run could not track to."""
    for name in names:
        if name != "tensorboard":  # comes with hiper_fast, and is left out where it is missing
            import_tracker(name)


def import_tracker(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"run.track: {name} needs its package ({error}); pip install 'hiper_fast[{name}]', or leave it out"
        ) from error


def list_numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn."""
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}


class TensorBoard:
    """Event files, if tensorboard is installed; the warm start has its own steps: a run apart."""

    def __init__(self, run_dir: Path, resume_step: int | None, options: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            SummaryWriter = None
        self._writer_type = SummaryWriter
        self._folder, self._options = run_dir / "tensorboard", options
        self._first_step = 0 if resume_step is None else resume_step + 1
        self._writers: dict[str, Any] = {}

    def add(self, row: Row) -> None:
        if self._writer_type is None:
            return
        writer = self._open_writer(WARM_START if row["stage"] == WARM_START else "")
        for key, value in list_numbers(row).items():
            writer.add_scalar(key, value, row["step"])

    def _open_writer(self, run: str) -> Any:
        if run not in self._writers:
            purge = None if run and self._first_step else self._first_step
            self._writers[run] = self._writer_type(str(self._folder / run), purge_step=purge)
            if self._options and not run:
                text = yaml.safe_dump(dict(self._options), sort_keys=False, allow_unicode=True)
                self._writers[run].add_text("config", indent(text))
        return self._writers[run]

    def close(self, table: Table, *, failed: bool) -> None:
        if table and "" in self._writers:
            self._writers[""].add_text(TABLE, write_markdown(table))
        for writer in self._writers.values():
            writer.close()


def indent(text: str) -> str:
    """As TensorBoard's Markdown shows it letter for letter."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def write_markdown(table: Table) -> str:
    rows = [
        (name, f"{rate:.1%}", n, f"{low:.1%}", f"{high:.1%}") for name, rate, n, low, high in table
    ]
    lines = [COLUMNS, ["--"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class Wandb:
    """Weights & Biases: a run in `run_dir/wandb`, which `wandb sync` uploads; WANDB_MODE=online does so at once."""

    def __init__(self, run_dir: Path, resume_step: int | None, options: Mapping[str, Any]):
        self._wandb = wandb = import_tracker("wandb")
        file = run_dir / "wandb-id"  # of the run on the server, which a resumed run goes on with
        known = file.read_text().strip() if resume_step is not None and file.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.resolve().name,
            dir=str(run_dir),
            id=known,
            resume="allow",
            config=dict(options),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        replace_text(file, f"{self._run.id}\n")
        for prefix, step in (("*", "update"), (f"{WARM_START}/*", f"{WARM_START}/step")):
            self._run.define_metric(step)
            self._run.define_metric(prefix, step_metric=step)

    def add(self, row: Row) -> None:
        step = f"{WARM_START}/step" if row["stage"] == WARM_START else "update"
        self._run.log({step: row["step"], **name_metrics(row)})

    def close(self, table: Table, *, failed: bool) -> None:
        if table:
            rows = [list(line) for line in table]
            self._run.log({TABLE: self._wandb.Table(columns=list(COLUMNS), data=rows)})
        self._run.finish(exit_code=int(failed))


class Trackio:
    """Trackio's database on this machine (TRACKIO_DIR), which `trackio show` draws; TRACKIO_SPACE_ID sends it on."""

    def __init__(self, run_dir: Path, resume_step: int | None, options: Mapping[str, Any]):
        self._trackio = import_tracker("trackio")
        with contextlib.redirect_stdout(io.StringIO()):  # it would speak into the panel
            self._run = self._trackio.init(
                project=PROJECT,
                name=run_dir.resolve().name,
                config=dict(options),
                resume="never" if resume_step is None else "allow",
                embed=False,
            )

    def add(self, row: Row) -> None:
        self._run.log(name_metrics(row), step=row["step"])

    def close(self, table: Table, *, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if table:
                rows = [list(line) for line in table]
                self._run.log({TABLE: self._trackio.Table(columns=list(COLUMNS), data=rows)})
            self._trackio.finish()


def name_metrics(row: Row) -> dict[str, float]:
    """The row's numbers; the warm start's under names of their own, for their steps are others."""
    numbers = list_numbers(row)
    if row["stage"] != WARM_START:
        return numbers
    return {f"{WARM_START}/{key.removeprefix(f'{WARM_START}/')}": v for key, v in numbers.items()}


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
