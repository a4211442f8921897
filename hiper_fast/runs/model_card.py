"""The model card: what a checkpoint is, how it came to be, how well it does, what it is not for."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedModel

import hiper_fast
from hiper_fast.config import Config
from hiper_fast.runs.formats import format_percent, format_whole
from hiper_fast.runs.health import Health
from hiper_fast.runs.metrics import count_turns, list_success

CARD = Path(__file__).parent / "page" / "card.md"
GIT = "git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
GIT_PATIENCE = 10  # seconds

Row = Mapping[str, Any]


def build(
    config: Config,
    step: int,
    rows: Sequence[Row],
    model: PreTrainedModel,
    data: Mapping[str, Any],
) -> str:
    """README.md of the checkpoint of update `step`, in the Hugging Face Hub's form; no license is made up.

    `rows` are those of metrics.jsonl, `data` what the environment says of its data. Nothing in the card
    depends on the clock: a resumed run writes the card that it would have written uninterrupted.
    """
    rows = [row for row in rows if row["stage"] == "warm_start" or row["step"] <= step]
    evals = [row for row in rows if row["stage"] == "eval" and row.get("eval/episodes")]
    return Template(CARD.read_text(encoding="utf-8")).substitute(
        header=yaml.safe_dump(describe_header(config), sort_keys=False, allow_unicode=True).strip(),
        name=config.run.name,
        step=step,
        environment=config.env.name,
        what=draw_table(describe_model(config, model)),
        checkpoint=f"{config.run.folder}/{config.run.name}/checkpoints/step-{step:06d}",
        training=draw_table(describe_training(config, step, rows, data)),
        results=draw_results(config, step, evals[-1]) if evals else "Not evaluated yet.",
        limits="\n".join(f"- {limit}" for limit in list_limits(config, rows)),
    )


def describe_header(config: Config) -> dict[str, Any]:
    """What the Hub reads."""
    base = find_base_model(config)
    return {
        "library_name": "peft" if config.model.lora_rank else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hiper_fast", "hiper", "reinforcement-learning", name_environment(config)],
        **({"base_model": base} if base else {}),
    }


def find_base_model(config: Config) -> str | None:
    """The hub id that training began with; None for the tiny model and for a folder."""
    path = config.model.path
    return None if path == "tiny" or Path(path).exists() else path


def name_environment(config: Config) -> str:
    return re.sub(r"\W+", "-", config.env.name)


def describe_model(config: Config, model: PreTrainedModel) -> dict[str, str]:
    agent = config.agent
    path = find_base_model(config) or Path(config.model.path).name
    began = "tiny, made by hiper_fast from random weights" if path == "tiny" else path
    adapted = f"; LoRA adapters of rank {config.model.lora_rank}" * bool(config.model.lora_rank)
    games = dataclasses.asdict(config.env)
    name = games.pop("name")
    return {
        "model": f"{began} ({type(model).__name__}){adapted}",
        "parameters": format_whole(sum(p.numel() for p in model.parameters())),
        "environment": f"{name}: {spell(games)}",
        "prompt": f"style {agent.style}, the last {agent.history} turns, at most "
        f"{agent.max_prompt_tokens} tokens",
        "response": f"at most {agent.max_response_tokens} tokens",
    }


def describe_training(
    config: Config, step: int, rows: Sequence[Row], data: Mapping[str, Any]
) -> dict[str, str]:
    train, advantage, start = config.train, config.advantage, config.warm_start
    episodes = max((row["episodes"] for row in rows if row["stage"] == "train"), default=0)
    turns = max(count_turns(rows).values())
    own = Path(start.demonstrations).suffix  # a file of episodes, not a scripted player
    episodes_shown = (
        f"episodes of {start.demonstrations}" if own else f"{start.episodes:,} scripted episodes"
    )
    shown = f"{episodes_shown} imitated, {start.epochs} times"
    return {
        "estimator": f"{advantage.estimator}, gamma {advantage.gamma:g}, "
        f"lambda {advantage.lambda_turn:g} over turns, {advantage.lambda_segment:g} over segments",
        "warm start": shown if start.enabled == "yes" else "none",
        "so far": f"{step:,} of {train.updates:,} updates, {episodes:,} episodes, {turns:,} turns",
        "learning rate": f"{train.lr:g}, of the critic {train.critic_lr:g}",
        "seed": str(config.run.seed),
        "made with": ", ".join(f"{name} {version}" for name, version in list_versions().items()),
        **({"data": spell(data)} if data else {}),
    }


@functools.cache
def list_versions() -> dict[str, str]:
    versions = {
        "hiper_fast": hiper_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    commit = find_commit()
    return {**versions, "commit": commit} if commit else versions


def find_commit() -> str | None:
    """The checkout's, where the package is run from one; marked where files differ from it."""
    root = Path(hiper_fast.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            GIT, cwd=root, capture_output=True, text=True, check=True, timeout=GIT_PATIENCE
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def draw_results(config: Config, step: int, row: Row) -> str:
    """The last evaluation: a line a task type, then all, each with its Wilson 95 % interval."""
    split = getattr(config.env, "eval_split", None)
    when = "this update" if row["step"] == step else f"update {row['step']:,}, the last evaluated"
    lines = [
        f"At {when}, on the fixed panel of {row['eval/episodes']:,} games"
        f"{f' ({split})' if split else ''} that training never plays, sampled at temperature "
        f"{config.eval.temperature:g}, at most {config.env.max_turns} turns each:",
        "",
        "| task type | games | success | 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, rate, count, *bounds in list_success(row):
        success, low, high = map(format_percent, (rate, *bounds))
        lines.append(f"| {clean(name)} | {count:,} | {success} | {low} to {high} |")
    return "\n".join(lines)


def list_limits(config: Config, rows: Sequence[Row]) -> list[str]:
    base = find_base_model(config)
    limits = [
        f"It plays {config.env.name} from prompts of the style it was trained with, and answers in "
        "their format. It is no chat model, and nothing is known of it elsewhere.",
        "The figures above are of one run with one seed; the intervals are of the panel's games only.",
        "It has not been examined for safety. What it writes are commands for a simulated world; do "
        "not let it act in a real one.",
        f"No license is given here: that of {base or 'what it was trained from and with'} applies.",
    ]
    alerts = [alert for alert in Health(rows).alerts if alert.until is None]
    return limits + [f"When it was saved the run had a {alert}." for alert in alerts]


def draw_table(lines: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {clean(text)} |" for key, text in lines.items())]
    )


def spell(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def clean(text: str) -> str:
    """A table's cell: what would end it is kept from doing so."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
