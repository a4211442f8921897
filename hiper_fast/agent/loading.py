"""From `model.path` to an agent: the tiny model, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hiper_fast.agent import attention, layers, lora, rotary, tiny, tokens
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.folders import ADAPTER, check_folder, explain
from hiper_fast.agent.probe import Probe
from hiper_fast.agent.runtime import silence_transformers
from hiper_fast.agent.speaker import Speaker
from hiper_fast.config import AgentConfig, ModelConfig
from hiper_fast.distributed import ALONE, World
from hiper_fast.options import ConfigError

Words = tuple[list[str], list[str]]  # words, command openings


def load_agent(
    config: ModelConfig,
    seed: int,
    tokenizer_file: Path | None = None,
    *,
    vocabulary: Callable[[], Words] = lambda: ([], []),
    speech: AgentConfig | None = None,
    world: World = ALONE,
) -> Agent:
    """The policy of `model.path`, any causal LM that passes the probe; "tiny" is built here with random weights.

    The tiny model's tokenizer is that of a family of games: `tokenizer_file`, or without one made of its
    `vocabulary` and of bytes. One of many processes keeps the model in the CPU's memory, until
    `Agent.shard` spreads it over them. With `speech` it is one that can play by these prompts and responses.
    """
    device = find_device(config, world)
    is_tiny = config.path == "tiny"
    if is_tiny:
        file = tokenizer_file
        tokenizer = tiny.load_tokenizer(file) if file else tiny.build_tokenizer(*vocabulary())
        model = build_tiny(config, seed, tokenizer)
    else:
        model, tokenizer = load_pretrained(config)
        if not lora.load_adapters(model) and config.lora_rank:
            lora.add_lora(model, config, seed)
    agent = prepare(model.to(device), tokenizer, config, tiny=is_tiny, world=world)
    if speech is not None:
        check_speech(agent, speech)
    if config.gradient_checkpointing:
        layers.recompute(model.base_model)
    if config.compile:
        layers.check_compiler(device)
        layers.keep_attention_eager()
        layers.compile_layers(model.base_model)
    return agent


def load_speaker(config: ModelConfig, speech: AgentConfig) -> Speaker:
    """Of a model whose weights are elsewhere: its tokenizer, no more of it is read, whose end token ends responses."""
    if config.path == "tiny":
        raise ConfigError(
            "model.path: tiny is built here; name the model that is served, a folder or hub id that has its tokenizer"
        )
    with naming_path(config), silence_transformers():
        tokenizer = read_tokenizer(config)
    pieces = tokens.list_pieces(tokenizer, tokens.vocabulary_size(tokenizer))
    tokens.check_tags(tokenizer, pieces, speech)
    end = tokenizer.eos_token_id
    return Speaker(tokenizer, pieces, () if end is None else (end,))


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    *,
    tiny: bool = False,
    world: World = ALONE,
) -> Agent:
    """An agent of a model that passes the probe; ConfigError if it does not."""
    with refusing(model):
        attention.check_mixing(model)
        attention.heed_cap(model)
        probe = Probe(model)
        agent = Agent(model, tokenizer, config, tiny=tiny, world=world)
        probe.check(agent)
    return agent


@contextlib.contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """Turns whatever a model or its tokenizer raises into one ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot read short sequences ({reason}); use another model"
        ) from error


def check_speech(agent: Agent, config: AgentConfig) -> None:
    """ConfigError where the model cannot read such prompts, or its tokenizer cannot write such responses."""
    model = agent.model.config
    tokens.check_tags(agent.tokenizer, agent.pieces, config)
    tokens.check_length(model, config)
    rotary.check_rotary(model, config.max_prompt_tokens + config.max_response_tokens)


def find_device(config: ModelConfig, world: World) -> torch.device:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device: {config.device} asked for, but torch sees no GPU; "
            "use --model.device cpu"
        )
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(
            f"model.device: {config.device!r} is no device; use cpu, cuda or auto"
        ) from None
    return device if world.size == 1 else torch.device("cpu")


def build_tiny(
    config: ModelConfig, seed: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    if config.lora_rank:
        raise ConfigError(
            "model.lora_rank: the tiny model has no trained base to adapt; give a --model, or 0"
        )
    return tiny.build_model(tokenizer, seed).to(getattr(torch, config.dtype))


def load_pretrained(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A folder's or hub id's model and tokenizer; ConfigError with the reason and the mend."""
    check_folder(config.path)
    if (Path(config.path) / ADAPTER).exists():
        lora.import_peft("model.path")
    with naming_path(config), silence_transformers():
        tokenizer, model = read_tokenizer(config), read_model(config)
    model.config.output_router_logits = False  # no auxiliary loss is trained: docs/policy.md
    return model, tokenizer


@contextlib.contextmanager
def naming_path(config: ModelConfig) -> Iterator[None]:
    """Turns whatever transformers raises of a stranger's files into one ConfigError."""
    try:
        yield
    except Exception as error:
        where, mend = config.path, ""
        if not Path(config.path).exists():
            where += " (no such folder here, so taken as a hub id)"
            if config.local_files_only:
                mend = "; to download it, add --model.local_files_only=false"
        raise ConfigError(f"model.path: cannot load {where}: {explain(error)}{mend}") from error


def choose_source(config: ModelConfig) -> dict[str, bool]:
    """What transformers is told of every file that it reads: no code of a stranger's, the network only if allowed."""
    return {"local_files_only": config.local_files_only, "trust_remote_code": False}


def read_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(config.path, **choose_source(config))
    if not tokenizer("a")["input_ids"]:  # what transformers makes of a folder without one
        raise ValueError("it holds no tokenizer; save the model's own beside its weights")
    return tokenizer


def read_model(config: ModelConfig) -> PreTrainedModel:
    """Never of pickles; ValueError where it lacks weights."""
    folder = Path(config.path)
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder.absolute()) if folder.exists() else config.path,  # adapters store it
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        output_loading_info=True,
        **choose_source(config),
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"its weights lack {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}, which would "
            "be random; save the whole causal LM"
        )
    return model
