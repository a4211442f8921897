"""The one configuration: typed dataclasses, YAML files, dotted command-line overrides; unknown keys are refused."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A bad option, value or configuration file; the message names it and how to mend it."""


def option(default, help: str):
    """A dataclass field with its default and the line that `--help` prints."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(slots=True)
class EnvConfig:
    name: str = option(
        "auto",
        "household, alfworld, webshop (recipes/default-NAME.yaml lies over the defaults), or auto: alfworld if "
        "$ALFWORLD_DATA is set, else household",
    )
    engine: str = option("native", "native, or textworld: the same games through the real TextWorld")
    size: str = option("small", "household games: small, medium or large rooms")
    task_types: list[str] | None = option(None, "household games: only these task types (default: all six)")
    split: str = option("train", "alfworld, webshop: the split to train on")
    eval_split: str = option("valid_seen", "alfworld, webshop: the split to evaluate on")
    data: str | None = option(None, "webshop: the folder of its files (default: $WEBSHOP_DATA, else the embedded shop)")
    goals: str = option("synthetic", "webshop: synthetic or human instructions")
    split_by: str = option("goal", "webshop: goal, as the original, or product: no product in two splits")
    max_turns: int = option(20, "turns after which an episode is truncated")


@dataclass(slots=True)
class AgentConfig:
    style: str = option(
        "auto",
        "prompt style: reference or compact, a prompt a turn; transcript, one conversation an episode, which trains as "
        "one sequence; or auto: compact for the tiny model, else reference",
    )
    history: int = option(
        8,
        "past turns shown in the prompt (compact: actions only; the paper's 2 show observations too; transcript: all)",
    )
    max_prompt_tokens: int = option(
        384, "longer prompts drop history, then the observation's tail; a transcript of so many tokens ends its episode"
    )
    max_response_tokens: int = option(28, "tokens sampled at most in a turn")
    batch_tokens: int = option(8192, "prompt tokens of the episodes that generate together, or one longer prompt")
    fallback: int = option(30, "a response without action block acts by its last characters, so many")
    temperature: float = option(1.0, "sampling temperature in training")


@dataclass(slots=True)
class ModelConfig:
    path: str = option("tiny", "tiny (built here, from scratch), or any causal LM: a folder or a hub id")
    critic: str = option("separate", "separate: a model of its own (paper); shared: three heads on the policy's trunk")
    device: str = option("auto", "cpu, cuda, or auto")
    dtype: str = option("float32", "float32 or bfloat16")
    local_files_only: bool = option(True, "never reach for the network: a hub id must already be in the local cache")
    lora_rank: int = option(0, "rank of LoRA adapters (peft); 0 trains all weights")
    lora_alpha: float = option(32.0, "scale of the adapters, divided by their rank")
    lora_targets: list[str] | None = option(
        None, "names of the layers to adapt (default: all linear ones of the trunk)"
    )
    gradient_checkpointing: bool = option(False, "recompute each layer in the backward pass: less memory, more time")
    compile: bool = option(False, "torch.compile the layers in training passes")


@dataclass(slots=True)
class RewardConfig:
    success: float = option(1.0, "reward of the winning turn (reference: 10)")
    invalid: float = option(-0.1, "added on a turn whose response does not keep the format")
    inadmissible: float = option(-0.1, "added on a turn whose command the environment does not list (reference: 0)")
    keep: float = option(0.0, "KEEP penalty (reference, ALFWorld: -0.3)")
    keep_mode: str = option("normalized", "normalized: divided by the episode's turns; fixed: on each KEEP turn")
    consistency: float = option(0.0, "added on a KEEP turn whose subgoal differs from the last one (reference: -0.3)")


@dataclass(slots=True)
class AdvantageConfig:
    estimator: str = option("hae", "hae: three levels (HiPER); gae: one flat level over turns, for comparison")
    gamma: float = option(0.98, "discount per turn (reference: 1)")
    lambda_turn: float = option(1.0, "lambda within a segment")
    lambda_segment: float = option(0.95, "lambda over segments (gae: over turns)")
    normalize: bool = option(True, "normalise each level over the turns that carry it")
    bootstrap: bool = option(False, "bootstrap truncated episodes from the state after them")
    malformed: bool = option(
        True, "tokens outside the blocks of an invalid turn train as its action (reference: false)"
    )


@dataclass(slots=True)
class TrainConfig:
    updates: int = option(24, "policy updates; 0 stops after the warm start")
    episodes: int = option(128, "episodes per update")
    minibatches: int = option(
        8, "optimiser steps per update, over turns (transcript: episodes) drawn without repetition"
    )
    critic_updates: int = option(2, "first updates that train the critic alone")
    final_lr: float = option(0.1, "both rates fall linearly to this share at the last update (reference: 1, constant)")
    beta2: float = option(0.99, "AdamW's second beta (reference: 0.999)")
    eps: float = option(
        1e-4, "AdamW's epsilon (reference: 1e-8): what has gradients far below it, as rare tokens have, hardly moves"
    )
    warmup_updates: int = option(4, "policy updates over which its learning rate rises")
    microbatch_tokens: int = option(8192, "tokens in one forward pass, or one longer sequence")
    old_logprobs: str = option(
        "sampled", "sampled: as the rollout stored them; recomputed: by the trainer, whose numerics differ in bfloat16"
    )
    lr: float = option(8e-4, "policy learning rate (reference, 1.5B: 1e-6)")
    critic_lr: float = option(1e-3, "critic learning rate (reference: 1e-5)")
    weight_decay: float = option(0.01, "AdamW weight decay")
    optimizer: str = option(
        "adamw", "adamw; adamw8bit: 8-bit moments (torchao); offload: masters and moments in the CPU's memory"
    )
    master_weights: bool = option(
        True, "bfloat16 weights train through float32 masters; false: small updates are lost to rounding"
    )
    grad_clip: float = option(1.0, "largest gradient norm")
    clip_low: float = option(0.2, "PPO clip below 1")
    clip_high: float = option(0.2, "PPO clip above 1")
    dual_clip: float = option(3.0, "PPO dual clip for negative advantages")
    kl_coef: float = option(0.01, "KL to the reference policy; 0 keeps no reference model")
    entropy_coef: float = option(0.001, "entropy bonus")
    value_clip: float = option(0.5, "value clip")
    value_coef: list[float] = option([1.0, 1.0, 1.0], "weights of the low, high and switch value losses")
    max_skipped: int = option(5, "non-finite losses in a row after which the run saves and stops")


@dataclass(slots=True)
class WarmStartConfig:
    enabled: str = option("auto", "imitate scripted episodes first: yes, no, or auto: only for the tiny model")
    demonstrations: str = option(
        "search", "search: an expert that looks for things; walkthrough: the game's own solution"
    )
    episodes: int = option(1000, "scripted episodes")
    epochs: int = option(1, "passes over them")
    noise: float = option(0.2, "share of turns on which the searching expert stumbles")
    imitate_noise: str = option(
        "auto", "imitate those turns too, for reinforcement to unlearn: yes, no, or auto: only for the tiny model"
    )
    batch_turns: int = option(32, "turns per optimiser step")
    lr: float = option(
        2.5e-3, "peak learning rate; warms up, then falls to a tenth (Muon, for the tiny model's matrices: 8 times it)"
    )


@dataclass(slots=True)
class EvalConfig:
    every: int = option(8, "updates between evaluations (the first and last state are always evaluated)")
    episodes: int = option(512, "games of the fixed panel; alfworld: at most the whole split, each game once")
    temperature: float = option(1.0, "sampling temperature in evaluation (reference: 0.4)")


@dataclass(slots=True)
class RunConfig:
    name: str = option("auto", "folder under runs/; auto: made of the environment and the seed")
    folder: str = option("runs", "where runs are kept")
    seed: int = option(0, "seed of games, initial weights and sampling")
    resume: bool = option(False, "continue from the run's latest checkpoint, exactly")
    save_every: int = option(10, "updates between checkpoints")
    keep: int = option(2, "checkpoints kept, beside the best")
    display: str = option("auto", "auto, plain (a line per update) or none")
    threads: int = option(0, "CPU threads; 0: one per core")


@dataclass(slots=True)
class PlanConfig:
    show: bool = option(False, "print the memory and time that the run will need, and stop")
    gpu: str = option("here", "what is planned for: here, the GPU or CPU at hand, or rtx4090, a100, h100 or h200")
    gpus: int = option(0, "how many of them share the run; 0: as many as torchrun started")
    memory_gb: float = option(0.0, "GiB of each; 0: as it has")
    host_memory_gb: float = option(0.0, "GiB of the CPU's memory, for offloading; 0: this machine's, or not checked")
    tflops: float = option(0.0, "TFLOP/s of a large product; 0: measured here, or from the table")
    gb_per_s: float = option(0.0, "GB/s of a copy; 0: measured here, or from the table")
    utilisation: float = option(0.4, "assumed share of the TFLOP/s that passes reach")
    turns: int = option(0, "turns of an update; 0: every episode runs to its limit")
    prompt_tokens: int = option(0, "mean tokens of a prompt; 0: as many as allowed")
    response_tokens: int = option(0, "mean tokens of a response; 0: as many as allowed")


@dataclass(slots=True)
class Config:
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


SHORT = {
    "env": "env.name",
    "model": "model.path",
    "seed": "run.seed",
    "updates": "train.updates",
    "name": "run.name",
    "resume": "run.resume",
    "plan": "plan.show",
}
CHOICES = {
    "env.name": ("auto", "household", "alfworld", "webshop"),
    "env.engine": ("native", "textworld"),
    "env.size": ("small", "medium", "large"),
    "env.goals": ("synthetic", "human"),
    "env.split_by": ("goal", "product"),
    "agent.style": ("auto", "reference", "compact", "transcript"),
    "model.critic": ("separate", "shared"),
    "model.dtype": ("float32", "bfloat16"),
    "reward.keep_mode": ("normalized", "fixed"),
    "advantage.estimator": ("hae", "gae"),
    "train.optimizer": ("adamw", "adamw8bit", "offload"),
    "train.old_logprobs": ("sampled", "recomputed"),
    "warm_start.enabled": ("auto", "yes", "no"),
    "warm_start.demonstrations": ("search", "walkthrough"),
    "warm_start.imitate_noise": ("auto", "yes", "no"),
    "run.display": ("auto", "plain", "none"),
    "plan.gpu": ("here", "rtx4090", "a100", "h100", "h200"),
}
POSITIVE = (
    "env.max_turns model.lora_alpha agent.batch_tokens agent.max_prompt_tokens agent.max_response_tokens "
    "agent.temperature train.episodes train.eps train.minibatches train.microbatch_tokens train.max_skipped "
    "warm_start.episodes warm_start.epochs warm_start.batch_turns eval.every eval.episodes run.save_every run.keep "
    "plan.utilisation"
).split()
NON_NEGATIVE = (
    "agent.history agent.fallback model.lora_rank train.updates train.critic_updates train.warmup_updates train.lr "
    "train.critic_lr train.weight_decay train.grad_clip train.clip_low train.clip_high train.kl_coef "
    "train.entropy_coef train.value_clip warm_start.lr warm_start.noise eval.temperature run.threads "
    "plan.gpus plan.memory_gb plan.host_memory_gb plan.tflops plan.gb_per_s plan.turns plan.prompt_tokens "
    "plan.response_tokens"
).split()
UNIT_INTERVAL = (
    "train.final_lr train.beta2 advantage.gamma advantage.lambda_turn advantage.lambda_segment warm_start.noise".split()
)


def options() -> dict[str, tuple[typing.Any, str]]:
    """Every dotted option -> (its type, its help line), in the order of the dataclasses."""
    table = {}
    for section in dataclasses.fields(Config):
        cls = section.default_factory
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            table[f"{section.name}.{f.name}"] = (hints[f.name], f.metadata["help"])
    return table


def convert(name: str, value: typing.Any, kind: typing.Any) -> typing.Any:
    """`value` (YAML-like) as the option's type, or a ConfigError that names the option."""
    if isinstance(kind, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is list:
        items = [v for v in value.split(",") if v] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ConfigError(f"{name}: expected a list (a,b,c), got {value!r}")
        return [convert(name, item, typing.get_args(kind)[0]) for item in items]
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1"):
            return True
        if str(value).lower() in ("false", "no", "0"):
            return False
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value)
            if number == float(value):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind is str and isinstance(value, bool):
        return "yes" if value else "no"
    elif kind is str and isinstance(value, (str, int, float)):
        return str(value)
    raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")


def set_option(config: Config, name: str, value: typing.Any, source: str) -> None:
    """Sets one dotted option; `source` (a file, or "command line") is named when there is no such option."""
    table = options()
    name = SHORT.get(name, name)
    if name not in table:
        near = difflib.get_close_matches(name, [*table, *SHORT], n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help for all options"
        raise ConfigError(f"{source}: unknown option {name!r}; {hint}")
    section, key = name.split(".")
    setattr(getattr(config, section), key, convert(name, value, table[name][0]))


def read_file(config: Config, path: str | Path) -> None:
    """Lays a YAML file of sections (`env: {size: medium}`), or the shipped recipe of that name, over `config`."""
    names = recipes()
    file = names[str(path)] if str(path) in names and not Path(path).is_file() else Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(path), names, n=1)
        hint = f"did you mean the recipe {near[0]}?" if near else f"the recipes are {', '.join(names)}"
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); {hint}") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ConfigError(f"--config {path}: expected sections such as 'train:' with options below them")
    for section, entries in content.items():
        for key, value in entries.items():
            set_option(config, f"{section}.{key}", value, f"--config {path}")


def recipes() -> dict[str, Path]:
    """Name -> file of the shipped recipes."""
    return {p.stem: p for p in sorted(RECIPES.glob("*.yaml")) if not p.stem.startswith("default-")}


def check(config: Config) -> None:
    """Raises ConfigError on the first value out of its range."""
    flat = flatten(config)
    for name, choices in CHOICES.items():
        if flat[name] not in choices:
            raise ConfigError(f"{name}: {flat[name]!r} is none of {', '.join(choices)}")
    for name in POSITIVE:
        if not flat[name] > 0:
            raise ConfigError(f"{name}: must be above 0, got {flat[name]}")
    for name in NON_NEGATIVE:
        if not flat[name] >= 0:
            raise ConfigError(f"{name}: must not be negative, got {flat[name]}")
    for name in UNIT_INTERVAL:
        if not 0 <= flat[name] <= 1:
            raise ConfigError(f"{name}: must lie in [0, 1], got {flat[name]}")
    if config.warm_start.noise == 1:
        raise ConfigError("warm_start.noise: must be below 1, or there is nothing left to imitate")
    if not config.train.dual_clip > 1:
        raise ConfigError(f"train.dual_clip: must be above 1, got {config.train.dual_clip}")
    if len(config.train.value_coef) != 3:
        raise ConfigError(
            f"train.value_coef: expected three numbers (low, high, switch), got {config.train.value_coef}"
        )


def flatten(config: Config) -> dict[str, typing.Any]:
    """Dotted option -> value."""
    return {f"{s}.{k}": v for s, entries in dataclasses.asdict(config).items() for k, v in entries.items()}


def write_file(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def parse(argv: list[str] | None, *, program: str, description: str) -> Config:
    """Command line -> Config: defaults, then every `--config FILE`, then `--section.option VALUE`, in order.

    Errors end the program with one line that names the option (exit status 2); `--help` lists every option.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m hiper_fast.{program}",
        usage="%(prog)s [--config FILE ...] [--section.option VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file of options, or a shipped recipe's name; a later one goes over it, the command line over all",
    )
    defaults = flatten(Config())
    short = {long: s for s, long in SHORT.items()}
    for name, (_, text) in options().items():
        names = [f"--{n}" for n in (short.get(name), name) if n]
        shown = f"{text} [{'none' if defaults[name] is None else defaults[name]}]".replace("%", "%%")
        bare = {"nargs": "?", "const": True} if isinstance(defaults[name], bool) else {}
        parser.add_argument(
            *names,
            dest=name,
            metavar=name.split(".")[1].upper(),
            help=shown,
            default=argparse.SUPPRESS,
            **bare,
        )
    arguments, unknown = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name != "config"}
    try:
        if unknown:
            if unknown[0].startswith("-"):
                set_option(Config(), unknown[0].lstrip("-").split("=")[0], None, "command line")
            raise ConfigError(f"command line: unexpected argument {unknown[0]!r}; options are --section.option VALUE")
        config = resolve(arguments.config, given)
        if config.run.resume:
            config = resolve([run_folder(config) / "config.yaml"], given)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return config


def resolve(files: list[str | Path], given: dict[str, typing.Any]) -> Config:
    """Defaults, those of the environment over them, then `files`, then the options `given`; checked."""
    config = layered(files, given)
    own = RECIPES / f"default-{environment(config)}.yaml"
    if own.exists():
        config = layered([own, *files], given)
    check(config)
    return config


def layered(files: list[str | Path], given: dict[str, typing.Any]) -> Config:
    config = Config()
    for file in files:
        read_file(config, file)
    for name, value in given.items():
        set_option(config, name, value, "command line")
    return config


def environment(config: Config) -> str:
    """`env.name` with auto resolved."""
    if config.env.name != "auto":
        return config.env.name
    return "alfworld" if os.environ.get("ALFWORLD_DATA") else "household"


def prompt_style(config: Config) -> str:
    """`agent.style` with auto resolved."""
    if config.agent.style != "auto":
        return config.agent.style
    return "compact" if config.model.path == "tiny" else "reference"


def run_folder(config: Config) -> Path:
    """The run's folder: a new one, or with `run.resume` the existing one that is meant.

    An automatic name is <environment>-seed<seed>, numbered when taken; resuming takes the newest of these.
    """
    root, name = Path(config.run.folder), config.run.name
    stem = f"{environment(config)}-seed{config.run.seed}"
    names = [name] if name != "auto" else [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    taken = [root / n for n in names if (root / n / "config.yaml").exists()]
    if config.run.resume:
        if not taken:
            raise ConfigError(
                f"--resume: there is no run {root / names[0]}; leave --resume out to start it, or give --name"
            )
        return taken[-1]
    free = next((root / n for n in names if not (root / n).exists()), None)
    if free is None:
        raise ConfigError(f"--name: the run {root / name} exists; continue it with --resume, or choose another name")
    return free
