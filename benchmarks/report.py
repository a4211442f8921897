"""docs/performance.md and its plot from a file of benchmark results.

pytest benchmarks/test_ops.py --benchmark-only --benchmark-json benchmarks/results/ops.json
python benchmarks/report.py benchmarks/results/ops.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from hiper_fast.bench import format_duration

DOCS = Path(__file__).resolve().parents[1] / "docs"
BY_HAND = "\n## Measured by hand\n"  # this and what follows stays as it is
INTRODUCTION = """# Performance

Made by `python benchmarks/report.py {source}` from one run of `pytest benchmarks/test_ops.py --benchmark-only
--benchmark-json {source}`. Each row was timed after its result was found to agree with the op's, on one thread; losses
with their gradients. Times are the best of their rounds, in {timer}. *Times* tells how many times as long as the op the
other took. *Rate* is the least work of the task (inputs read and results written once, or the operations of the matrix
products) over that time; *of roofline* is its share of what the machine reached in the same run: copying {copied},
multiplying float32 matrices {multiplied}.

{machine}

![How many times as long as the op the others took](performance.svg)
"""


def main() -> None:
    source = Path(sys.argv[1])
    run = json.loads(source.read_text())
    entries = [b["extra_info"] | {"seconds": b["stats"]["min"]} for b in run["benchmarks"]]
    timed = [e for e in entries if "by" in e]
    cases = {}
    for e in timed:
        cases.setdefault((e["op"], e["size"]), []).append(e)
    facts = run["machine_info"]
    page = INTRODUCTION.format(
        source=source.as_posix(),
        timer={"perf_counter": "wall time"}.get(run_timer(run), "processor time"),
        copied=f"{timed[0]['roofline']['bytes'] / 1e9:.3g} GB/s",
        multiplied=f"{timed[0]['roofline']['operations'] / 1e9:.3g} GFLOP/s",
        machine=f"{facts['cpu'].get('brand_raw', facts['processor'])}, {facts['cpu'].get('count', '?')} cores · "
        f"{facts['system']} {facts['release']} · Python {facts['python_version']} · torch {timed[0]['torch']} · "
        f"{run['datetime'][:10]}",
    )
    ratios = []
    for op in dict.fromkeys(op for op, _ in cases):
        page += f"\n## {op}\n\n| size | by | time | times | rate | of roofline |\n|---|---|--:|--:|--:|--:|\n"
        for (name, size), rows in cases.items():
            if name != op:
                continue
            ours = next(e["seconds"] for e in rows if e["by"] == "hiper_fast")
            for e in rows:
                times = e["seconds"] / ours
                page += f"| {size} | {e['by']} | {format_duration(e['seconds'])} | {times:.3g} | {rate(e)} |\n"
                if e["by"] != "hiper_fast":
                    ratios.append((f"{op} {size}, {e['by']}", times))
    for e in entries:
        if "peak" in e:
            held = {
                which: f"{x['beyond_gradients'] / 1e6:.3g} MB" for which, x in e["peak"].items()
            }
            page += f"\nPeak memory of `linear_ppo` beyond its gradients, {e['size']}: {held['op']}; with all logits "
            page += f"materialised in torch {held['materialised']}.\n"
    page += "\n## Targets\n\n"
    page += "".join(
        f"- {e['target']}: {'met' if e['met'] else 'missed'}.\n" for e in entries if "target" in e
    )
    file = DOCS / "performance.md"
    _, heading, notes = file.read_text().partition(BY_HAND)
    file.write_text(page + heading + notes)
    (DOCS / "performance.svg").write_text(plot(ratios))


def run_timer(run: dict) -> str:
    return run["benchmarks"][0]["options"]["timer"]


def rate(entry: dict) -> str:
    """Two cells: work a second, and its share of the roofline."""
    kind, unit = ("operations", "GFLOP/s") if entry["operations"] else ("bytes", "GB/s")
    reached = entry[kind] / entry["seconds"]
    return f"{reached / 1e9:.3g} {unit} | {100 * reached / entry['roofline'][kind]:.3g} %"


def plot(ratios: list[tuple[str, float]]) -> str:
    """A bar for each, on a scale of powers of ten from the op's own time."""
    row, left, decade = 22, 330, 95
    lines = []
    for i, (label, times) in enumerate(ratios):
        y = 30 + row * i
        width = decade * max(0.0, math.log10(times))
        lines += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left}" y="{y}" width="{max(width, 1):.1f}" height="15" fill="#3b7dd8"/>',
            f'<text x="{left + width + 6:.1f}" y="{y + 12}">{times:.3g}x</text>',
        ]
    height = 40 + row * len(ratios)
    grid = [
        f'<line x1="{left + decade * k}" x2="{left + decade * k}" y1="22" y2="{height - 10}" stroke="#bbb"/>'
        f'<text x="{left + decade * k}" y="16" text-anchor="middle">{10**k:,}x</text>'
        for k in range(5)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 5 * decade}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#444">\n'
        + "\n".join(grid + lines)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
