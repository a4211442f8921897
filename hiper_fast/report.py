"""A run as one page, or several in one.

python -m hiper_fast.report runs/<name>                  # writes its report.html
python -m hiper_fast.report runs/a-seed0 runs/a-seed1 runs/b-seed0 …    # curves and tables over seeds and estimators
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hiper_fast.configure import make_config, read_run
from hiper_fast.options import ConfigError, list_local
from hiper_fast.runs.report import build
from hiper_fast.runs.several import build_several


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.report",
        description="Write a run's report.html; of several runs one page, where those that differ in their seed alone "
        "are the seeds of one arm.",
    )
    parser.add_argument("run", type=Path, nargs="+", help="a run folder, like runs/<name>")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the page of several runs goes [the folder `compared` beside them]",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.folder and len(arguments.run) == 1:
            raise ConfigError("--folder: a single run's page lies in its own folder; leave it out")
        if len(arguments.run) == 1:
            print(build(*arguments.run))
        else:
            local = set().union(*map(find_local, arguments.run))
            print(build_several(arguments.run, arguments.folder, local))
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def find_local(folder: Path) -> set[str]:
    """Of a run's options those of the machine; none where its environment or engine is not to be had."""
    try:
        return list_local(make_config(read_run(folder)))
    except ConfigError:
        return set()


if __name__ == "__main__":
    sys.exit(main())
