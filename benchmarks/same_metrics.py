"""Whether two checkouts train alike: small runs of every kind in both, metrics but for times to the last digit.

python benchmarks/same_metrics.py OTHER_CHECKOUT [--only NAME …] [--folder FOLDER]

For changes that must not change results. Both checkouts need their extension built (or none). With $ALFWORLD_DATA the
official games are played too. Runs that a folder already holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = (
    "--run.threads 1 --updates 2 --run.save_every 1 --run.display none --warm_start.episodes 32 --train.episodes 12 "
    "--train.critic_updates 1 --eval.episodes 12 --eval.every 1 --train.microbatch_tokens 2048 --train.minibatches 3"
)
HIPER = "--reward.keep -0.3 --reward.consistency -0.3 --advantage.bootstrap true --env.max_turns 8 --reward.success 10"
RUNS = {  # name -> the options of each command of the run
    "household": ["--env household"],
    "household-medium": [f"--env household --env.size medium {HIPER} --advantage.malformed no"],
    "household-gae": [f"--env household --advantage.estimator gae {HIPER}"],
    "household-raw-advantages": [
        "--env household --advantage.normalize no --reward.keep -0.3 --reward.keep_mode fixed"
    ],
    "household-reference": [
        f"--env household --agent.style reference --agent.max_prompt_tokens 700 {HIPER}"
    ],
    "household-transcript": [
        f"--env household --agent.style transcript --agent.max_prompt_tokens 1200 {HIPER}"
    ],
    "household-shared": ["--env household --model.critic shared --train.value_coef 0.1,0.1,0.1"],
    "household-recomputed": [
        "--env household --train.old_logprobs recomputed --model.gradient_checkpointing"
    ],
    "household-bfloat16": ["--env household --model.dtype bfloat16"],
    "household-walkthrough": [
        "--env household --warm_start.demonstrations walkthrough --train.kl_coef 0"
    ],
    "household-resumed": ["--env household --updates 1", "--env household --resume --updates 2"],
    "household-two-processes": ["--env household"],
    "webshop": ["--env webshop"],
    "webshop-reference": ["--env webshop --agent.style reference --agent.max_prompt_tokens 900"],
    "webshop-transcript": ["--env webshop --agent.style transcript --agent.max_prompt_tokens 1500"],
    "alfworld": ["--env alfworld --env.max_turns 12"],
    "alfworld-reference": [
        "--env alfworld --env.max_turns 8 --agent.style reference --agent.max_prompt_tokens 1500"
    ],
    "alfworld-transcript": [
        "--env alfworld --env.max_turns 8 --agent.style transcript --agent.max_prompt_tokens 2500"
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the checkout to compare this one with")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), help="these runs alone [all]"
    )
    parser.add_argument("--folder", type=Path, help="where the runs are kept [a temporary folder]")
    arguments = parser.parse_args()
    checkouts = {"here": Path(__file__).resolve().parents[1], "other": arguments.other.resolve()}
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        for name in arguments.only:
            if name.startswith("alfworld") and not os.environ.get("ALFWORLD_DATA"):
                print(f"{name}: left out, $ALFWORLD_DATA is not set")
                continue
            rows = {
                side: metrics_of(checkout, name, folder / side)
                for side, checkout in checkouts.items()
            }
            same = rows["here"] == rows["other"]
            different += not same
            print(
                f"{name}: {'the same' if same else 'DIFFERENT'}, {len(rows['here'])} rows",
                flush=True,
            )
            if not same:
                print("\n".join(differences(rows["here"], rows["other"])))
    return min(different, 1)


def metrics_of(checkout: Path, name: str, runs: Path) -> list[dict]:
    """The rows of the run's metrics.jsonl without times and single games, which older checkouts do not tell.

    The run is made if it is not there.
    """
    file = runs / name / "metrics.jsonl"
    processes = 2 if name.endswith("two-processes") else 1
    launcher = f"-m torch.distributed.run --nproc-per-node {processes} " * (processes > 1)
    if not file.exists():
        for options in RUNS[name]:
            command = (
                f"{launcher}-m hiper_fast.train {SMALL} {options} --run.folder {runs} --name {name}"
            )
            subprocess.run([sys.executable, *command.split()], cwd=checkout, check=True)
    rows = map(json.loads, file.read_text().splitlines())
    return [
        {key: row[key] for key in row if not key.startswith(("time/", "eval/won/"))} for row in rows
    ]


def differences(here: list[dict], other: list[dict]) -> list[str]:
    """A line for each value that differs."""
    lines = [f"  {len(here)} rows here, {len(other)} there"] if len(here) != len(other) else []
    for a, b in zip(here, other, strict=False):
        lines += [
            f"  {a['stage']} {a['step']} {key}: {a.get(key)} here, {b.get(key)} there"
            for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key)
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
