"""A run as one page: `python -m hiper_fast.report runs/<name>` writes its `report.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hiper_fast.runs.report import build


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.report", description="Write a run's report.html."
    )
    parser.add_argument("run", type=Path, help="the run folder, like runs/<name>")
    try:
        print(build(parser.parse_args(argv).run))
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
