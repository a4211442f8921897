"""Compare estimators, or any other options: arms x seeds at equal updates, their curves and what can be told.

python -m hiper_fast.compare study.yaml                    # base, arms and seeds; the runs go to runs/study
python -m hiper_fast.compare --arms hae,gae,grpo --seeds 3 --env household    # arms by their estimators' names
python -m hiper_fast.compare --folder runs/study           # go on where it was stopped, or tell the results anew

Options of a run (--train.updates 8) go over those of every arm. docs/compare.md says how results are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from hiper_fast import train
from hiper_fast.bench import describe_machine
from hiper_fast.configure import name_source, read_arguments, read_files
from hiper_fast.options import ConfigError, flatten, suggest
from hiper_fast.runs.comparison import MEASURES, Question, compare
from hiper_fast.runs.comparison_page import write_page
from hiper_fast.runs.folder import replace_text
from hiper_fast.runs.formats import format_percent
from hiper_fast.runs.lock import hold
from hiper_fast.runs.metrics import read_metrics
from hiper_fast.runs.report import select_evaluations
from hiper_fast.runs.statistics import import_scipy_stats
from hiper_fast.study import (
    STUDY,
    Run,
    Study,
    check_recorded,
    list_compared,
    load_study,
    name_folder,
    read_base,
    read_study,
    record_study,
    select_arms,
    write_arms,
)

LOGS = "logs"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.compare",
        usage="%(prog)s [STUDY.yaml] [--arms A,B] [--seeds N] [--folder FOLDER] [--section.option VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--arms", metavar="A,B", help="those of the file's arms; without a file: estimators")
    add("--seeds", metavar="N", help="how many, or a list of them: 3 is 0,1,2 [the file's, or 1]")
    add("--jobs", metavar="N", type=int, help="runs at a time [as many as cores]")
    add("--folder", metavar="FOLDER", type=Path, help="the study's [runs/<name of the file>]")
    add("--against", metavar="ARM", help="the arm that the others are compared with [the first]")
    add("--measure", choices=MEASURES, help="success that is compared: at equal turns, of the last "
        "evaluation, or the mean of the last ones [equal]")  # fmt: skip
    add("--tail", metavar="N", type=int, help="how many evaluations the last ones are [3]")
    add("--threshold", metavar="RATE", type=float, help="success whose turns are told [halfway: "
        "from the compared arm's start to its success at equal turns]")  # fmt: skip
    add("--only-report", action="store_true", help="only the results of the runs that are there")
    return parser


def read_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[Study, dict[str, Any]]:
    """The study, and the command's own arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    file = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    first = argparse.ArgumentParser(parents=[parser], add_help=False, allow_abbrev=False)
    own = vars(first.parse_known_args(argv)[0])
    content, source, folder = find_content(file, own)
    given = read_arguments(parser, argv, read_base(content, source))
    if not content:
        raise ConfigError("give a study's file, --arms A,B or the --folder of an old study")
    options = {name: value for name, value in given.items() if name not in {*own, "config"}}
    settings = [*read_files(given.get("config", [])), *name_source(options)]
    return read_study(content, source, folder, settings), own


def find_content(file: Path | None, own: dict[str, Any]) -> tuple[dict[str, Any], str, Path]:
    """A study's content, where it was said, and its folder."""
    names = own["arms"].split(",") if "arms" in own else []
    folder = own.get("folder")
    if file is None and folder and not names:
        file = folder / STUDY
    if file is None:
        content, source = write_arms(names) if names else {}, "--arms"
        folder = folder or Path("runs", "compare-" + name_folder("-".join(names)))
    else:
        content, source = load_study(file), str(file)
        content = select_arms(content, names, source) if names else content
        folder = folder or Path("runs", file.stem)
    if "seeds" in own:
        content = {**content, "seeds": parse_seeds(own["seeds"])}
    return content, source, folder


def parse_seeds(text: str) -> int | list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",") if seed]
    except ValueError:
        raise ConfigError(f"--seeds: expected a number, or some (0,1,2), got {text!r}") from None
    return seeds if "," in text or not seeds else seeds[0]


def run_all(runs: Sequence[Run], jobs: int) -> dict[str, str]:
    """Makes every run that is not finished, `jobs` at a time. Returns what failed: label -> why."""
    unfinished = [run for run in runs if not run.is_finished]
    waiting = order_work(unfinished)
    total, failed = len(waiting), {}
    say(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished; {total} to make")
    for number, (run, status) in enumerate(work_off(waiting, jobs), 1):
        if status or not run.is_finished:
            failed[run.label] = f"failed (exit status {status}): {read_last_line(run)}"
        say(f"[{number}/{total}] {run.label}: {failed.get(run.label) or tell_success(run)}")
    return failed | {run.label: f"not begun: {run.start.label} failed" for run in waiting}


def order_work(unfinished: Sequence[Run]) -> list[Run]:
    """The runs, each warm start that is still to be made before the first of those that begin from it."""
    ordered: dict[Path, Run] = {}
    for run in unfinished:
        if not is_ready(run):
            ordered.setdefault(run.start.folder, run.start)
        ordered[run.folder] = run
    return list(ordered.values())


def work_off(waiting: list[Run], jobs: int) -> Iterator[tuple[Run, int]]:
    """Begins runs as soon as they can; yields each with its exit status, and leaves what cannot begin."""
    working: dict[ForkServerProcess, Run] = {}
    try:
        while True:
            for run in [run for run in waiting if is_ready(run)][: jobs - len(working)]:
                waiting.remove(run)
                working[begin(run)] = run
            if not working:
                return
            wait([process.sentinel for process in working])
            ended = [process for process in working if not process.is_alive()]
            yield from [(working.pop(process), process.exitcode) for process in ended]
    finally:
        for process in working:
            process.terminate()


def is_ready(run: Run) -> bool:
    return run.start is None or run.saved is not None or run.start.is_finished


def begin(run: Run) -> ForkServerProcess:
    find_log(run).parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # which imports once for all runs
    context.set_forkserver_preload(["hiper_fast.train"])
    process = context.Process(target=work, args=(run,), daemon=True)
    process.start()
    return process


def work(run: Run) -> None:
    """`hiper_fast.train`, in a process of its own that ends with the one that began it."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with find_log(run).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # that of a killed comparison may still be leaving
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        if not run.saved:
            shutil.rmtree(run.folder, ignore_errors=True)
        sys.exit(train.main([*spell(run), *(["--resume"] if run.saved else [])]))


def leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def spell(run: Run) -> list[str]:
    """The command line of a run."""
    options = flatten(run.config) | {"run.display": "plain"}
    del options["run.resume"]
    return [f"--{name}={spell_value(value)}" for name, value in options.items()]


def spell_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def find_log(run: Run) -> Path:
    return run.folder.parent / LOGS / f"{run.folder.name}.log"


def read_last_line(run: Run) -> str:
    log = find_log(run)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it said nothing"]
    return f"{lines[-1]} (log: {log})"


def tell_success(run: Run) -> str:
    """Success at a finished run's start and end."""
    rows = select_evaluations(read_metrics(run.folder / "metrics.jsonl"))
    rates = [format_percent(row["eval/success"]) for row in (rows[0], rows[-1])]
    return " → ".join(rates if run.config.train.updates else rates[:1])


def say(text: str) -> None:
    print(text, flush=True)


def read_question(study: Study, own: dict[str, Any]) -> Question:
    """What is asked of the study's runs, checked."""
    asked = {name: own[name] for name in ("measure", "tail", "threshold") if name in own}
    question = Question(own.get("against", next(iter(study.arms))), **asked)
    if question.reference not in study.arms:
        near = suggest(question.reference, list(study.arms), f"it has {', '.join(study.arms)}")
        raise ConfigError(f"--against: the study has no arm {question.reference!r}; {near}")
    if question.tail < 1:
        raise ConfigError("--tail: must be at least 1")
    if not 0 <= (question.threshold or 0) <= 1:
        raise ConfigError("--threshold: a share of games from 0 to 1")
    return question


def report(study: Study, question: Question) -> Path:
    """Writes results.json, report.html and results.md of the finished runs; returns the page."""
    folders: dict[str, dict[int, Path]] = {name: {} for name in study.arms}
    unfinished = []
    for run in study.list_runs():
        if run.is_finished:
            folders[run.arm][run.seed] = run.folder
        else:
            unfinished.append(run.label)
    config = study.arms[question.reference]
    split = {"split": config.env.eval_split} if hasattr(config.env, "eval_split") else {}
    results = {
        "study": study.folder.resolve().name,
        "seeds": study.seeds,
        "unfinished": unfinished,
        "panel": {"environment": config.env.name, **split, **dataclasses.asdict(config.eval)},
        "options": {name: list_compared(config) for name, config in study.arms.items()},
        "made_with": describe_machine() | {"scipy": version("scipy")},
        **compare(folders, question),
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    replace_text(study.folder / "results.json", text)
    return write_page(results, study.folder)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs
    failed: dict[str, str] = {}
    try:
        import_scipy_stats()  # what is missing shows now, not after hours
        study, own = read_command_line(parser, argv)
        question, jobs = read_question(study, own), own.get("jobs", os.cpu_count() or 1)
        if jobs < 1:
            raise ConfigError("--jobs: must be at least 1")
        check_recorded(study)
        if not own.get("only_report"):
            with hold(study.folder, "comparison", "give this one another --folder"):
                record_study(study)
                failed = run_all(study.list_runs(), jobs)
        for label, why in failed.items():
            print(f"{parser.prog}: {label}: {why}", file=sys.stderr)
        say(f"report: {report(study, question)}")
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
