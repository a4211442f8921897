"""The embedded default model: a Qwen3-type LM of 0.4 million parameters and a word tokenizer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hiper_fast.ops.find_roles import byte_level_alphabet

END, PAD = "<|end|>", "<|pad|>"
TAGS = ["<switch>", "</switch>", "<subgoal>", "</subgoal>", "<action>", "</action>"]
NUMBERS = 64  # from 0 on, each one token
ROPE_THETA = 100_000.0
SMALL, SHARPNESS = 0.1, 1.25  # of what is to start small; of queries and keys
TURN, DECAY = 4, 0.84  # of the bias that looks one token back, by frequency
TURNING = 10  # frequencies that rotation changes within a prompt
NOTE, COPY = 0.06, 0.1  # of what the heads write
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
SPLIT = r"</?[a-z]+>|(?:click|search)\[| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer(words: list[str], openings: list[str]) -> PreTrainedTokenizerFast:
    """A lossless tokenizer: bytes where no longer token fits.

    One token is each of `words`, alone and after a space, each tag and each of `openings`.
    """
    letters = byte_level_alphabet()

    def spell(piece: str) -> str:
        return "".join(letters[byte] for byte in piece.encode())

    words = dict.fromkeys([*words, *map(str, range(NUMBERS))])
    pieces = itertools.chain.from_iterable((word, " " + word) for word in words)
    tokens = [PAD, END, *letters, *map(spell, [*TAGS, *openings, *pieces])]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def make_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def cuts_before_blanks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of a text are those of its parts, wherever it is cut before a space or a new line.

    So they are where it is split by SPLIT, in which either can only be the first character of a piece, and where
    nothing else looks beyond a piece.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer or backend.truncation or backend.padding:
        return False
    split = backend.pre_tokenizer and backend.pre_tokenizer.__getstate__()
    return split == make_pre_tokenizer().__getstate__() and not any(
        added.lstrip or added.rstrip or added.single_word or re.search("[ \n]", added.content)
        for added in backend.get_added_tokens_decoder().values()
    )


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a tokenizer.json."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """The model with random weights drawn from `seed`."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        **SIZES,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        start_copying(model.model.layers)
    return model


def is_saved_in(folder: str | Path) -> bool:
    """Whether a folder holds a model of this shape."""
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):  # a hub id, or no JSON
        return False
    own = {"model_type": Qwen3Config.model_type, **SIZES}
    return isinstance(config, dict) and own.items() <= config.items()


@torch.no_grad()
def start_copying(layers: nn.ModuleList) -> None:
    """Makes an induction head of the first two layers' first: what followed a token follows again.

    The head of the first layer looks one token back (its bias alone gives query and key, which the
    rotary embedding turns towards that token) and notes which token it is, in directions that are
    not read for a token's own name. The head of the second looks for notes of the present token,
    that is, at what followed it, and predicts what is there. All else that layers add starts
    small, lest it drown the tokens' names. Training is free to change all of it.
    """
    for layer in layers:
        layer.mlp.down_proj.weight *= SMALL
        layer.self_attn.o_proj.weight *= SMALL
    first, second = (layer.self_attn for layer in layers[:2])
    d = first.head_dim
    for attention in (first, second):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:d] *= SMALL
        attention.q_norm.weight.fill_(SHARPNESS)
        attention.k_norm.weight.fill_(SHARPNESS)

    frequencies = ROPE_THETA ** (-torch.arange(0, d, 2) / d)
    strength = TURN * DECAY ** torch.arange(d // 2)  # most where one token more or less turns much
    first.q_proj.bias[:d] = strength.repeat(2) * torch.cat([frequencies.cos(), -frequencies.sin()])
    first.k_proj.bias[: d // 2] = strength

    slow = (torch.arange(d) % (d // 2) >= TURNING).nonzero()[:, 0]
    directions = torch.empty_like(first.q_proj.weight[: first.q_proj.in_features])  # [h, h]
    nn.init.orthogonal_(directions)
    names, notes, copies = directions[: len(slow)], directions[-len(slow) :], directions[:d]
    first.v_proj.weight[slow] += names
    first.o_proj.weight[:, slow] += NOTE * notes.T
    second.q_proj.weight[slow] += names
    second.k_proj.weight[slow] += notes
    second.v_proj.weight[:d] += copies
    second.o_proj.weight[:, :d] += COPY * copies.T
