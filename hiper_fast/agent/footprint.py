"""A model's sizes from its configuration alone: its own code runs on torch's meta device."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from hiper_fast.agent import attention, tiny
from hiper_fast.agent.cache import PagedCache, Shape, count_bytes, measure_shapes
from hiper_fast.agent.decoding import Decoder, Entering
from hiper_fast.agent.folders import check_folder, explain
from hiper_fast.agent.head import Head
from hiper_fast.agent.layers import find_layers, recompute
from hiper_fast.options import ConfigError

# Width, width inside the MLP, layers, heads, key-value heads, vocabulary: no network is needed.
QWEN25 = {
    "Qwen/Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936),
    "Qwen/Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064),
}
QWEN3 = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151936),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, 151936),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8, 151936),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 151936),
}
UNTIED = "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B"  # their head is not their embedding
ATTENTION = "hiper_fast_sizes"
META = torch.device("meta")
# Layers of a deeper model that are run, with gradients or without; each more adds as much as the last of them.
COUNTED = {True: 2, False: 3}  # without, the first needs less than the others
ONE: Shape = (1, 1), (1, 1), torch.float32


def find_architecture(
    path: str, tokenizer_file: Path | None, local_files_only: bool
) -> PretrainedConfig:
    """That of `model.path`: tiny, a folder's, a hub id's in the cache, or a well-known one."""
    if path == "tiny":
        return tiny.build_model(tiny.load_tokenizer(tokenizer_file), 0).config
    name = path.removesuffix("-Instruct").removesuffix("-Base")
    known = name in QWEN25 or name in QWEN3
    check_folder(path)
    try:
        return AutoConfig.from_pretrained(
            path, local_files_only=local_files_only or known, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers raises of a stranger's file
        if (Path(path) / "config.json").exists():
            raise ConfigError(f"model.path: cannot load {path}: {explain(error)}") from error
        if not known:
            raise ConfigError(
                f"model.path: {path} is no folder with a config.json, is not in the local cache, "
                f"and is none of {', '.join([*QWEN25, *QWEN3])}; give a folder, or allow the "
                "download: --model.local_files_only=false"
            ) from error
    width, inner, layers, heads, kv_heads, vocabulary = QWEN25.get(name) or QWEN3[name]
    kind, options = (Qwen2Config, {}) if name in QWEN25 else (Qwen3Config, {"head_dim": 128})
    return kind(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name not in UNTIED,
        **options,
    )


@dataclass(frozen=True)
class Footprint:
    """What memory and time depend on; numbers of values, not bytes."""

    source: str  # the architecture, as JSON
    tensors: tuple[int, ...]  # each weight of the model, tied ones once
    trunk: tuple[int, ...]  # without an untied head
    linears: tuple[tuple[str, int], ...]  # of the trunk: name, inputs + outputs
    layer: int  # weights of the largest layer
    layers: int
    width: int
    vocabulary: int
    heads: int  # x head size: what attention computes with
    kv: int  # of one token in the engine's cache, all layers

    @property
    def total(self) -> int:
        return sum(self.tensors)

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def computed(self) -> int:
        """The trunk's weights that every token is multiplied with."""
        return sum(self.trunk) - self.head

    @property
    def outside(self) -> int:
        """The weights outside the layers: embedding, head and a norm."""
        return self.total - sum(self.trunk) + self.head + self.width

    def adapters(self, rank: int, targets: list[str] | None) -> tuple[int, ...]:
        """The weights of LoRA's adapters, for the trunk's linear layers or those of `targets`."""
        ends = ((name.rpartition(".")[2], size) for name, size in self.linears)
        return tuple(rank * size for name, size in ends if targets is None or name in targets)


@functools.cache
def measure_model(
    path: str, tokenizer_file: Path | None, local_files_only: bool = True
) -> Footprint:
    """The footprint of `model.path`; `tokenizer_file` is the tiny model's."""
    config = find_architecture(path, tokenizer_file, local_files_only)
    source = config.to_json_string(use_diff=False)
    model = build_skeleton(source, torch.float32)
    config, trunk = model.config, model.base_model
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    linears = ((n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Linear))
    attention.use(model)
    return Footprint(
        source=source,
        tensors=tuple(p.numel() for p in model.parameters()),
        trunk=tuple(p.numel() for p in trunk.parameters()),
        linears=tuple((name, sum(linear.weight.shape)) for name, linear in linears),
        layer=max(count_weights(layer) for layer in find_layers(trunk)),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=heads * size,
        kv=count_bytes(measure_shapes(model)) // torch.float32.itemsize,
    )


def count_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build_skeleton(source: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """The model on the meta device, of its own depth or of `layers`."""
    options = json.loads(source)
    if layers is not None:
        options["num_hidden_layers"] = layers
        if options.get("layer_types"):
            options["layer_types"] = options["layer_types"][:layers]
    config = AutoConfig.for_model(**options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


@dataclass(frozen=True)
class Pass:
    """One pass of a trunk over a microbatch, or of the engine over its rows."""

    peak: float  # bytes held at most beside weights, gradients, caches and what goes in
    operations: float  # that compute something: kernels, on a GPU
    moved: float  # bytes that these read and write, but for weights and caches


def count_pass(
    footprint: Footprint,
    tokens: int,
    dtype: torch.dtype,
    *,
    train: bool,
    checkpointing: bool = False,
) -> Pass:
    """Forward, and with `train` backward.

    Attention is counted as flash-attention: no tokens x tokens. Gradients of weights are float32,
    as with masters.
    """
    options = tokens, dtype, train, checkpointing
    return deepen(
        lambda layers: count_layers(footprint.source, layers, *options),
        footprint.layers,
        COUNTED[train],
    )


def deepen(count: Callable[[int], Pass], layers: int, counted: int) -> Pass:
    """`count(layers)`, of a deep model without running more than `counted` of them."""
    if layers <= counted:
        return count(layers)
    pairs = zip(astuple(count(counted - 1)), astuple(count(counted)), strict=True)
    return Pass(*(most + (layers - counted) * (most - least) for least, most in pairs))


@functools.cache
def count_layers(
    source: str, layers: int, tokens: int, dtype: torch.dtype, train: bool, checkpointing: bool
) -> Pass:
    trunk = build_skeleton(source, dtype, layers).base_model
    if checkpointing:
        recompute(trunk)
    weights = list(trunk.parameters())
    for weight in weights:
        weight.grad_dtype = torch.float32
        weight.grad = torch.empty_like(weight, dtype=torch.float32)
    with torch.device("meta"):
        inputs = torch.empty(1, tokens, trunk.config.hidden_size, dtype=dtype, requires_grad=True)
        options = {
            "position_ids": torch.empty(1, tokens, dtype=torch.long),
            "attention_mask": torch.empty(1, 1, 0, 0),  # of four dimensions: no mask is made
            "use_cache": False,
        }
    kept = [inputs, *options.values(), *weights, *trunk.buffers(), *(w.grad for w in weights)]
    with torch.set_grad_enabled(train), Held(kept) as held:
        hidden = trunk(inputs_embeds=inputs, **options).last_hidden_state
        if train:
            hidden.backward(torch.empty_like(hidden))
    return Pass(held.peak, held.operations, held.moved)


def count_sampling(footprint: Footprint, dtype: torch.dtype, rows: int, prompt: int = 0) -> Pass:
    """A pass of the built-in engine: another token of each of `rows`; `prompt`: it reads one of so many tokens too."""
    source, options = footprint.source, (dtype, rows, prompt)
    return deepen(
        lambda layers: sample_layers(source, layers, *options), footprint.layers, COUNTED[False]
    )


@functools.cache
def sample_layers(source: str, layers: int, dtype: torch.dtype, rows: int, prompt: int) -> Pass:
    model, shapes = build_sampler(source, dtype, layers)
    decoder = build_decoder(model, shapes, max(prompt, 1), rows=rows + 1, blocks=1, limit=1)
    entering = [Entering(rows, [0] * prompt, 0, [0], np.zeros(1), 1.0)] if prompt else []
    kept = [*model.parameters(), *model.buffers(), *list_state(decoder)]
    pools = [pool for pair in decoder.cache.pools for pool in pair]
    with Held([*kept, *pools]) as held:
        decoder.read(entering, range(rows))
    return Pass(held.peak, held.operations, held.moved)


@functools.cache
def build_sampler(source: str, dtype: torch.dtype, layers: int) -> tuple[nn.Module, list[Shape]]:
    """A skeleton as the engine reads it, and what its cache holds for a token."""
    model = build_skeleton(source, dtype, layers)
    attention.use(model)
    return model, measure_shapes(model)


def build_decoder(
    model: nn.Module | None, shapes: list[Shape], size: int, *, rows: int, blocks: int, limit: int
) -> Decoder:
    """The engine's own on the meta device, with a cache of one block of `size` tokens."""
    head = None if model is None else Head(model.config.get_text_config().vocab_size)
    agent = SimpleNamespace(model=model, head=head, stop_ids=(0,), device=META)
    return Decoder(agent, PagedCache(shapes, 1, size, META), rows, blocks, limit)


def list_state(decoder: Decoder) -> list[Tensor]:
    return [value for value in vars(decoder).values() if isinstance(value, Tensor)]


@functools.cache
def count_state(rows: int, blocks: int, limit: int) -> int:
    """Bytes of what the engine keeps of its rows, of so many blocks and response tokens each."""
    decoder = build_decoder(None, [ONE], 1, rows=rows, blocks=blocks, limit=limit)
    return sum(tensor.nbytes for tensor in list_state(decoder))


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made, and still alive, within; `peak`: the most at any moment."""

    def __init__(self, outside: list):
        """Memory of the tensors in `outside` does not count."""
        super().__init__()
        tensors = (item for item in outside if isinstance(item, Tensor))
        self.outside = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.seen = set(self.outside)
        self.now = self.peak = self.operations = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        results = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        for tensor in results:
            self.count(tensor.untyped_storage())
        if not func.is_view:
            given = (item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor))
            self.moved += sum(self.measure(tensor) for tensor in (*given, *results))
        return result

    def measure(self, tensor: Tensor) -> int:
        """Bytes that are read or written of it, if it was made within."""
        inside = tensor.untyped_storage()._cdata not in self.outside
        return inside * tensor.nbytes

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class FlashSizes(torch.autograd.Function):
    """What flash-attention holds: arguments, result, a number a row; backward, a sum more."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # [1, heads, tokens]
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        _sums = torch.empty_like(query, dtype=torch.float32)  # alive while the others are made
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attend_flash(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value with their own heads -> [1, tokens, heads, d]."""
    return FlashSizes.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend_flash)
AttentionMaskInterface.register(ATTENTION, lambda *arguments, **options: None)
