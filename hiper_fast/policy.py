"""The agent's networks: the language model, its tokenizer, and a critic with three heads (low, high, switch)."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hiper_fast import attention, ops, tiny
from hiper_fast.batch import Microbatch
from hiper_fast.config import ConfigError, ModelConfig, RunConfig
from hiper_fast.distributed import ALONE, World, inside

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


class Critic(nn.Module):
    """Three values a position: low, high, switch. Reads a trunk of its own (paper) or the policy's hidden states."""

    def __init__(self, trunk: nn.Module | None, hidden_size: int, device: torch.device):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.Linear(hidden_size, 3, device=device)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> float32 [..., 3]."""
        rows = hidden.float().flatten(0, -2)  # of more dimensions a linear layer returns a view: FSDP warns of them
        return self.heads(rows).unflatten(0, hidden.shape[:-1])


class Agent:
    """Policy, critic and frozen reference policy, with the passes that rollouts and updates need."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        *,
        tiny: bool,
        world: World = ALONE,
    ):
        attention.use(model)
        self.model, self.tokenizer, self.config, self.world, self.tiny = model, tokenizer, config, world, tiny
        self.pieces = ops.TokenPieces(tokenizer, model.get_input_embeddings().num_embeddings)
        self.critic: Critic | None = None
        self.reference: PreTrainedModel | None = None
        self.lora = hasattr(model, "peft_config")
        ids = model.generation_config.eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        self.stop_ids = tuple(dict.fromkeys([*ids, *[i for i in [tokenizer.eos_token_id] if i is not None]]))
        if not self.stop_ids:
            raise ConfigError(
                f"model.path: {config.path} names no end-of-sequence token; set one in its tokenizer's configuration"
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def add_critic(self) -> Critic:
        """The critic, its trunk starting from the policy's present weights; its heads start at zero."""
        trunk = self._twin(self.model.base_model) if self.config.critic == "separate" else None
        self.critic = Critic(trunk, self.model.get_input_embeddings().embedding_dim, self.device)
        self.world.shard(self.critic.heads)
        return self.critic

    def freeze_reference(self) -> None:
        """Keeps the present policy as it is: the reference of the KL term. LoRA's base is not copied."""
        self.reference = self._twin(self.model, frozen=True)
        if self.lora and not any(p.any() for name, p in self.reference.named_parameters() if "lora_B" in name):
            self.reference.disable_adapters()  # not trained yet: the base model itself

    def shard(self) -> None:
        """Spreads the policy over the processes, after reference and critic have been copied from it."""
        self.world.shard(self.model, layers(self.model))

    def _twin(self, module: nn.Module, *, frozen: bool = False) -> nn.Module:
        """A copy that has weights of its own where they train and shares the frozen ones; spread over the processes."""
        copied = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
        if frozen:
            copied.eval().requires_grad_(False)
        if self.config.compile:
            compile_layers(copied)
        return self.world.shard(copied, layers(copied))

    def eager(self) -> contextlib.AbstractContextManager:
        """For generation: layers compiled for training would be compiled anew for every layer's KV cache."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()

    def decode(self, ids: list[int]) -> bytes:
        """The text of a response, special tokens left out; the same bytes `find_roles` reads."""
        return b"".join(self.pieces[i] for i in ids)

    def find_roles(self, response_ids: Tensor, cu_tokens: Tensor):
        return ops.find_roles(response_ids, cu_tokens, self.pieces)

    def trunk(self, batch: Microbatch, *, reference: bool = False) -> Tensor:
        """Last hidden states [tokens, h] of packed sequences."""
        return hidden_states(self.reference if reference else self.model, batch)

    def critic_hidden(self, batch: Microbatch, policy_hidden: Tensor | None = None) -> Tensor:
        """The hidden states [tokens, h] that the critic's heads read."""
        if self.critic.trunk is not None:
            return hidden_states(self.critic.trunk, batch)
        return self.trunk(batch) if policy_hidden is None else policy_hidden

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float, *, reference: bool = False) -> Tensor:
        """Log-probs, float32 [n], of `targets` [n] from the hidden states that predict them, [n, h]."""
        model = self.reference if reference else self.model
        return inside(
            model, lambda: ops.linear_logprobs(hidden, targets=targets, temperature=temperature, **head_of(model))
        )

    def ppo_loss(self, hidden: Tensor, *data: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
        """`ops.linear_ppo` through the policy's head; `data`: targets, old log-probs and advantages, each [n]."""
        names = "targets", "old_logprobs", "advantages"
        options |= zip(names, data, strict=True)
        return inside(self.model, lambda: ops.linear_ppo(hidden, **options, **head_of(self.model)))


def head_of(model: PreTrainedModel) -> dict[str, Tensor | None]:
    head = model.get_output_embeddings()
    return {"weight": head.weight, "bias": getattr(head, "bias", None)}


def hidden_states(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """The last hidden states [tokens, h] that a model's trunk gives packed sequences, each read as if it were alone."""
    ids, position_ids = batch.input_ids[None], batch.position_ids[None]
    options = attention.packed(batch, model.dtype)
    out = inside(model, lambda: model.base_model(ids, position_ids=position_ids, use_cache=False, **options))
    return out.last_hidden_state[0]


def configure_torch(config: RunConfig) -> None:
    """Threads, and denormals as zero: gradients of small models are full of them and they slow the CPU down."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else each pass gets its activations' memory from the system anew, page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(config: ModelConfig) -> str:
    """`model.device` with auto resolved."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(config: ModelConfig, seed: int, family: str = "household", world: World = ALONE) -> Agent:
    """The policy of `model.path`, any causal LM; "tiny" is built here with random weights for a family of games.

    One of many processes keeps it in the CPU's memory, until `Agent.shard` spreads it over them.
    """
    name = device_name(config)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"model.device: {name} asked for, but torch sees no GPU; use --model.device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device: {name!r} is no device; use cpu, cuda or auto") from None
    if world.size > 1:
        device = torch.device("cpu")
    if config.path == "tiny":
        tokenizer = tiny.load_tokenizer(family)
        model = tiny.build_model(tokenizer, seed).to(device, getattr(torch, config.dtype))
        if config.lora_rank:
            raise ConfigError("model.lora_rank: the tiny model has no trained base to adapt; give a --model, or 0")
        return prepared(model, tokenizer, config, world=world, tiny=True)
    folder = Path(config.path)
    where = config.path if folder.exists() else f"{config.path} (no such folder here, so taken as a hub id)"
    if (folder / "adapter_config.json").exists():
        import_peft("model.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, local_files_only=config.local_files_only)
        if not tokenizer("a")["input_ids"]:  # what transformers makes of a folder without one
            raise ValueError("it holds no tokenizer; save the model's own beside its weights")
        model = AutoModelForCausalLM.from_pretrained(
            str(folder.absolute()) if folder.exists() else config.path,  # adapters store where their base is
            dtype=getattr(torch, config.dtype),
            local_files_only=config.local_files_only,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        missing = config.local_files_only and not folder.exists()
        mend = "; to download it, add --model.local_files_only=false" if missing else ""
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise ConfigError(f"model.path: cannot load {where}: {reason}{mend}") from error
    scaled = [
        k
        for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if getattr(model.config, k, None) not in (None, 1, 1.0)
    ]
    if scaled:
        raise ConfigError(
            f"model.path: {config.path} changes logits after the head ({scaled[0]}); the fused log-probs cannot"
        )
    if hasattr(model, "peft_config"):  # a folder of adapters, as our checkpoints with LoRA are
        model.set_adapter("default")
    elif config.lora_rank:
        add_lora(model, config, seed)
    return prepared(model.to(device), tokenizer, config, world=world, tiny=False)


def import_peft(option: str):
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{option}: LoRA needs peft ({error}); pip install 'hiper_fast[lora]'") from error
    return peft


def add_lora(model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
    """Freezes the model and gives its layers adapters that change nothing yet; their first factors from `seed`."""
    lora = import_peft("model.lora_rank").LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(lora)
        except ValueError as error:
            option = "model.lora_targets" if config.lora_targets else "model.lora_rank"
            raise ConfigError(f"{option}: {textwrap.shorten(str(error), 300)}") from error


def prepared(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, **options) -> Agent:
    """The agent of a model, its layers recomputed or compiled where the options ask for it."""
    if config.gradient_checkpointing:
        recompute(model.base_model)
    if config.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=model.device))
        except Exception as error:
            reason = textwrap.shorten(str(error), 200)
            raise ConfigError(f"model.compile: torch.compile does not work here ({reason}); leave it false") from error
        # Packed attention stays out: its lists of lengths would be compiled anew for every microbatch.
        AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attention))
        compile_layers(model.base_model)
    return Agent(model, tokenizer, config, **options)


def layers(trunk: nn.Module) -> list[nn.Module]:
    return [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute(trunk: nn.Module) -> None:
    """Has the layers keep their inputs alone and run again in the backward pass."""
    for layer in layers(trunk):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    trunk.register_forward_pre_hook(recompute_with_gradients)


def recompute_with_gradients(trunk: nn.Module, inputs: tuple) -> None:
    """A layer recomputes itself when it is in training mode: only with gradients, for rollouts need its KV cache."""
    for layer in layers(trunk):
        layer.training = torch.is_grad_enabled()


def compile_layers(trunk: nn.Module) -> None:
    """Compiles the layers one by one: they share their code, so it is compiled once and not once a layer."""
    for layer in layers(trunk):
        layer.compile(dynamic=True)
