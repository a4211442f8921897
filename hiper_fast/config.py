"""The options of a run. `hiper_fast.configure` reads them; docs/decisions.md says how they came to be declared so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hiper_fast.options import option

MOST_SEEDS = 2**63 - 1


@dataclass(slots=True)
class EnvConfig:
    """What every environment has; each adds its own options in its `family.py`."""

    name: str = option(
        "auto",
        "household, alfworld, webshop, another that is installed, or package.module:Family; auto: alfworld if "
        "$ALFWORLD_DATA is set, else household. It brings options and defaults of its own",
    )
    max_turns: int = option(20, "turns after which an episode is truncated", above=0, per_env=True)


@dataclass(slots=True)
class AgentConfig:
    style: str = option(
        "auto",
        "prompt style: reference or compact, a prompt a turn; transcript, one conversation an episode, that trains as "
        "one sequence; or auto: compact for the tiny model, else reference",
    )
    chat_template: dict = option(
        {},
        "what the model's chat template is told beside the messages, as '{enable_thinking: false}'; a name that it "
        "never reads is refused",
    )
    subgoals: bool = option(
        True,
        "every response keeps or switches a subgoal and names it; false: it is an action alone, as flat PPO has",
    )
    history: int = option(
        8,
        "past turns shown in the prompt (compact: actions only; the paper's 2 show observations too; transcript: all)",
        least=0,
    )
    max_prompt_tokens: int = option(
        384,
        "longer prompts drop history, then the observation's tail; a transcript of so many tokens ends its episode",
        above=0,
        per_env=True,
    )
    max_response_tokens: int = option(28, "tokens sampled at most in a turn", above=0, per_env=True)
    batch_tokens: int = option(
        8192, "prompt tokens that a rollout reads in one pass, or one longer prompt", above=0
    )
    shown_subgoal: Literal["kept", "written"] = option(
        "kept",
        "what prompts call the current subgoal; kept: the one that the last SWITCH set; written: the last one that a "
        "response named, on a KEEP turn too (reference)",
    )
    fallback: int = option(
        30,
        "a response without action block acts by its last characters, so many",
        least=0,
        per_env=True,
    )
    temperature: float = option(1.0, "sampling temperature in training", above=0, most=100)


@dataclass(slots=True)
class ModelConfig:
    path: str = option(
        "tiny",
        "tiny (built here, from scratch), or any causal LM: a folder or a hub id. Which of two defaults counts depends "
        "on it: the tiny model's, also for checkpoints of it, or the paper's for a pretrained model",
    )
    critic: Literal["separate", "shared"] = option(
        "separate",
        "separate: a model of its own (paper); shared: three heads on the policy's trunk",
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is a GPU", local=True)
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "float32 or bfloat16; without a word a pretrained model on a GPU is in bfloat16"
    )
    local_files_only: bool = option(
        True, "never reach for the network: a hub id must already be in the local cache"
    )
    lora_rank: int = option(0, "rank of LoRA adapters (peft); 0 trains all weights", least=0)
    lora_alpha: float = option(32.0, "scale of the adapters, divided by their rank", above=0)
    lora_targets: list[str] | None = option(
        None, "names of the layers to adapt (default: all linear ones of the trunk)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute each layer in the backward pass: less memory, more time"
    )
    compile: bool = option(False, "torch.compile the layers in training passes")


@dataclass(slots=True)
class RolloutConfig:
    """What every engine has; one may add its own options (`Engine.Options`)."""

    engine: str = option(
        "paged",
        "what samples responses: paged (the model that trains, here), openai (a served model, for eval and "
        "play), another that is installed, or package.module:Engine. It may bring options of its own",
    )
    slots: int = option(
        256, "episodes played at once in a process; the others wait for a free place", above=0
    )
    ahead: int = option(
        0,
        "1: the next rollout plays while an update learns, with weights one update old; needs importance weights "
        "(train.old_logprobs recomputed, train.importance_cap)",
        least=0,
        most=1,
    )
    workers: int = option(
        0,
        "processes that each play one episode at a time, for environments that are slow or may crash or hang; 0: all "
        "are played in this one",
        least=0,
        most=1024,
    )
    env_timeout: float = option(
        60.0, "seconds that a reset or step may take in a worker", above=0, most=86400
    )
    env_memory_gb: float = option(
        0.0, "GiB of data that a worker may have (Linux); 0: any", least=0
    )
    max_lost: float = option(
        0.25,
        "share of an update's or evaluation's episodes that environments may lose; beyond it the run saves and stops",
        least=0,
        most=1,
    )


@dataclass(slots=True)
class RewardConfig:
    success: float = option(1.0, "reward of the winning turn (reference: 10)", least=-1e6, most=1e6)
    invalid: float = option(
        -0.1, "added on a turn whose response does not keep the format", least=-1e6, most=1e6
    )
    inadmissible: float = option(
        -0.1,
        "added on a turn whose command the environment does not list (reference: 0)",
        least=-1e6,
        most=1e6,
    )
    keep: float = option(
        0.0, "KEEP penalty (reference, ALFWorld: -0.3)", least=-1e6, most=1e6, per_env=True
    )
    keep_mode: Literal["normalized", "fixed"] = option(
        "normalized", "normalized: divided by the episode's turns; fixed: on each KEEP turn"
    )
    consistency: float = option(
        0.0,
        "added on a KEEP turn whose subgoal differs from the last one (reference: -0.3)",
        least=-1e6,
        most=1e6,
    )


@dataclass(slots=True)
class AdvantageConfig:
    estimator: str = option(
        "hae",
        "hae: three levels (HiPER); hae_no_switch; gae: one flat level over turns; token_gae: over tokens; without a "
        "critic, with train.group: grpo, dr_grpo, rloo, gigpo, group_hae; another that is installed, or "
        "package.module:function",
    )
    gamma: float = option(
        0.98, "discount per turn (reference: 1; token_gae: per token, 1 is usual)", least=0, most=1
    )
    lambda_turn: float = option(1.0, "lambda within a segment", least=0, most=1)
    lambda_segment: float = option(
        0.95, "lambda over segments (gae: over turns; token_gae: over tokens)", least=0, most=1
    )
    normalize: bool = option(True, "normalise each level over the turns that carry it")
    bootstrap: Literal["none", "next_state", "reference"] = option(
        "none",
        "what stands for the reward that a truncated episode misses; next_state: V_high of the state after it; "
        "reference (hae): V_low of its last turn, V_high of its last segment's start",
        flag=("none", "next_state"),
        per_env=True,
    )
    malformed: bool = option(
        True, "tokens outside the blocks of an invalid turn train as its action (reference: false)"
    )


@dataclass(slots=True)
class TrainConfig:
    updates: int = option(24, "policy updates; 0 stops after the warm start", least=0)
    episodes: int = option(128, "episodes per update", above=0)
    group: int = option(
        1, "episodes of each game in an update, for estimators that compare them", above=0
    )
    minibatches: int = option(
        8,
        "optimiser steps per update, over turns (transcript: episodes) drawn without repetition",
        above=0,
    )
    minibatch_size: int = option(
        0,
        "turns (transcript: episodes) per optimiser step, in place of train.minibatches; 0: as that says "
        "(reference: 256)",
        least=0,
    )
    shuffle: Literal["turns", "episodes"] = option(
        "turns",
        "what minibatches draw: turns, each by itself; or episodes, whose turns stay together, so that more of what "
        "they begin with is read once (reference: episodes, as they were played)",
    )
    critic_updates: int = option(2, "first updates that train the critic alone", least=0)
    final_lr: float = option(
        0.1,
        "both rates fall linearly to this share at the last update (reference: 1, constant)",
        least=0,
        most=1,
    )
    beta2: float = option(0.99, "AdamW's second beta (reference: 0.999)", least=0, below=1)
    eps: float = option(
        1e-4,
        "AdamW's epsilon (reference: 1e-8): what has gradients far below it, as rare tokens have, hardly moves",
        above=0,
        most=1,
    )
    warmup_updates: int = option(4, "policy updates over which its learning rate rises", least=0)
    microbatch_tokens: int = option(
        8192, "tokens in one forward pass, or one longer sequence", above=0
    )
    share_prefixes: bool = option(
        True,
        "read what turns of a forward pass begin with once; false: every turn whole, the same but for rounding",
    )
    old_logprobs: Literal["sampled", "recomputed"] = option(
        "sampled",
        "sampled: as the rollout stored them; recomputed: by the trainer, whose numerics differ in bfloat16",
    )
    importance_cap: float = option(
        0.0,
        "with recomputed: a token's advantage is weighted by exp(recomputed - sampled log-prob), at most this (2 is "
        "usual); 0: not weighted",
        least=0,
    )
    lr: float = option(8e-4, "policy learning rate (reference, 1.5B: 1e-6)", least=0, most=1)
    critic_lr: float = option(1e-3, "critic learning rate (reference: 1e-5)", least=0, most=1)
    weight_decay: float = option(0.01, "AdamW weight decay", least=0, most=1)
    optimizer: Literal["adamw", "adamw8bit", "offload"] = option(
        "adamw",
        "adamw; adamw8bit: 8-bit moments (torchao); offload: masters and moments in the CPU's memory",
    )
    master_weights: bool = option(
        True,
        "bfloat16 weights train through float32 masters; false: small updates are lost to rounding",
    )
    grad_clip: float = option(1.0, "largest gradient norm; 0: any", least=0)
    loss: Literal["ppo", "cispo"] = option(
        "ppo",
        "ppo: clipped ratio, dual clip; cispo: clipped ratio as a constant weight of the log-prob's gradient",
    )
    ratio: Literal["token", "turn", "sequence"] = option(
        "token",
        "importance ratio of a token: its own; or the geometric mean of its turn's or its sequence's (GSPO); a "
        "sequence is a turn, with transcript an episode",
    )
    aggregation: Literal["token", "sequence", "constant"] = option(
        "token",
        "token: mean over a minibatch's loss tokens; sequence: mean over its sequences of each one's mean; constant: "
        "their sum, divided by the most response tokens that its sequences could have (Dr. GRPO)",
    )
    clip_low: float = option(
        0.2, "clip of the ratio below 1, by less than 1; with cispo 1: none", least=0, most=1
    )
    clip_high: float = option(0.2, "clip of the ratio above 1", least=0)
    dual_clip: float = option(3.0, "PPO dual clip for negative advantages", above=1)
    kl_coef: float = option(0.01, "KL to the reference policy; 0 keeps no reference model", least=0)
    entropy_coef: float = option(0.001, "entropy bonus", least=0)
    value_clip: float = option(0.5, "value clip", least=0)
    value_coef: list[float] = option(
        [1.0, 1.0, 1.0], "weights of the low, high and switch value losses", count=3, least=0
    )
    max_skipped: int = option(
        5, "non-finite losses in a row after which the run saves and stops", above=0
    )


@dataclass(slots=True)
class WarmStartConfig:
    enabled: Literal["auto", "yes", "no"] = option(
        "auto", "imitate scripted episodes first: yes, no, or auto: only for the tiny model"
    )
    demonstrations: str = option(
        "search",
        "search: a player that looks for things, place after place in random order; listed: in the order the game "
        "lists them; walkthrough: the game's own solution; or a .jsonl file of one's own (docs/training.md)",
    )
    episodes: int = option(3000, "scripted episodes; a file's are all shown", above=0)
    epochs: int = option(1, "passes over them", above=0)
    noise: float = option(
        0.2, "share of turns on which the searching expert stumbles", least=0, below=1
    )
    imitate_noise: Literal["yes", "no"] = option(
        "no", "imitate those turns too, for reinforcement to unlearn: yes or no"
    )
    batch_turns: int = option(32, "turns per optimiser step", above=0)
    lr: float = option(
        2.5e-3,
        "peak learning rate; warms up, then falls to a tenth (Muon, for the tiny model's matrices: 8 times it)",
        least=0,
        most=1,
    )


@dataclass(slots=True)
class EvalConfig:
    every: int = option(
        8, "updates between evaluations (the first and last state are always evaluated)", above=0
    )
    panel: Literal["test", "tune"] = option(
        "test",
        "test: games for what is reported; tune: others, to choose settings on. They share none, nor with training",
    )
    episodes: int = option(
        512,
        "games of the panel; alfworld: at most the whole split, each game once",
        above=0,
        per_env=True,
    )
    temperature: float = option(
        1.0, "sampling temperature in evaluation (reference: 0.4)", least=0, most=100
    )


@dataclass(slots=True)
class RunConfig:
    name: str = option(
        "auto", "folder under run.folder; auto: made of the environment and the seed"
    )
    folder: str = option("runs", "where runs are kept")
    seed: int = option(0, "seed of games, initial weights and sampling", least=0, most=MOST_SEEDS)
    resume: bool = option(False, "continue from the run's latest checkpoint, exactly")
    resume_from: int | None = option(
        None,
        "resume from this update's checkpoint; what came later is kept in a folder apart",
        least=0,
    )
    save_every: int = option(10, "updates between checkpoints", above=0)
    save_minutes: float = option(
        30.0, "minutes after which an update is saved all the same; 0: by updates alone", least=0
    )
    keep: int = option(2, "checkpoints kept, beside the best", above=0)
    display: Literal["auto", "panel", "plain", "none"] = option(
        "auto",
        "panel (live), plain (a line per update), none, or auto: panel in a terminal, else plain",
        local=True,
    )
    track: list[Literal["tensorboard", "wandb", "trackio"]] = option(
        ["tensorboard"],
        "where metrics go beside metrics.jsonl, some of: tensorboard, wandb (offline unless $WANDB_MODE says else), "
        "trackio",
    )
    threads: int = option(0, "CPU threads; 0: one per core", least=0, most=1024)


@dataclass(slots=True)
class PlanConfig:
    show: bool = option(False, "print the memory and time that the run will need, and stop")
    gpu: Literal["here", "rtx4090", "a100", "h100", "h200"] = option(
        "here", "what is planned for: here, the GPU or CPU at hand, or rtx4090, a100, h100 or h200"
    )
    gpus: int = option(0, "how many of them share the run; 0: as many as torchrun started", least=0)
    memory_gb: float = option(0.0, "GiB of each; 0: as it has", least=0)
    host_memory_gb: float = option(
        0.0, "GiB of the CPU's memory, for offloading; 0: this machine's, or not checked", least=0
    )
    tflops: float = option(
        0.0, "TFLOP/s of a large product; 0: measured here, or from the table", least=0
    )
    gb_per_s: float = option(0.0, "GB/s of a copy; 0: measured here, or from the table", least=0)
    utilisation: float = option(
        0.4, "assumed share of the TFLOP/s that passes reach", above=0, most=1
    )
    turns: int = option(0, "turns of an update; 0: every episode runs to its limit", least=0)
    prompt_tokens: int = option(0, "mean tokens of a prompt; 0: as many as allowed", least=0)
    response_tokens: int = option(0, "mean tokens of a response; 0: as many as allowed", least=0)
    shared_scoring: float = option(
        0.0,
        "share of the tokens that scoring and prompts need not read again (a run's scoring/shared_tokens)",
        least=0,
        below=1,
    )
    shared_update: float = option(
        0.0, "the same of updates (a run's update/shared_tokens)", least=0, below=1
    )


@dataclass(slots=True)
class Config:
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


SHORT = {  # names for the command line
    "env": "env.name",
    "model": "model.path",
    "seed": "run.seed",
    "updates": "train.updates",
    "name": "run.name",
    "resume": "run.resume",
    "plan": "plan.show",
}
