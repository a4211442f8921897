"""The embedded default model: a Qwen3-type causal LM of 0.4 million parameters and a word tokenizer, from scratch.

`python -m hiper_fast.tiny` writes the shipped tokenizers anew.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hiper_fast.ops.find_roles import byte_level_alphabet

HERE = Path(__file__).parent
FOLDERS = {"household": HERE / "tiny_tokenizer", "webshop": HERE / "tiny_tokenizer_webshop"}
END, PAD = "<|end|>", "<|pad|>"
TAGS = [f"<{slash}{name}>" for name in ("switch", "subgoal", "action") for slash in ("", "/")]
ROPE_THETA = 100_000.0
SMALL, SHARPNESS = 0.1, 1.25  # of what is to start small; of queries and keys
OPENINGS = {"household": [], "webshop": ["click[", "search["]}  # of commands, each one token
SPLIT = r"</?[a-z]+>|(?:click|search)\[| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer(words: list[str], openings: list[str]) -> PreTrainedTokenizerFast:
    """A lossless tokenizer: each word of `words`, alone and after a space, each tag and each of `openings` is one
    token; all else is bytes."""
    letters = byte_level_alphabet()
    pieces = [p for word in dict.fromkeys([*words, *map(str, range(64))]) for p in (word, " " + word)]
    encoded = ["".join(letters[b] for b in piece.encode()) for piece in [*TAGS, *openings, *pieces]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([PAD, END, *letters, *encoded]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def load_tokenizer(family: str = "household") -> PreTrainedTokenizerFast:
    """The shipped tokenizer of a family of environments."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDERS[family] / "tokenizer.json"),
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """The model with random weights drawn from `seed`."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
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


@torch.no_grad()
def start_copying(layers: nn.ModuleList) -> None:
    """Starts the first two layers' first heads as an induction head, which copies: what followed a token follows again.

    The head of the first layer looks one token back (its bias alone gives query and key, which the rotary embedding
    turns towards that token) and notes which token it is, in directions that are not read for a token's own name. The
    head of the second looks for notes of the present token, that is, at what followed it, and predicts what is there.
    All else that layers add starts small, lest it drown the tokens' names. Training is free to change all of it.
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
    strength = 4 * 0.84 ** torch.arange(d // 2)  # most where one token more or less turns much
    first.q_proj.bias[:d] = strength.repeat(2) * torch.cat([frequencies.cos(), -frequencies.sin()])
    first.k_proj.bias[: d // 2] = strength

    slow = (torch.arange(d) % (d // 2) >= 10).nonzero()[:, 0]  # where rotation hardly matters within a prompt
    directions = nn.init.orthogonal_(torch.empty_like(first.q_proj.weight[: first.q_proj.in_features]))
    names, notes, copies = directions[: len(slow)], directions[-len(slow) :], directions[:d]
    first.v_proj.weight[slow] += names
    first.o_proj.weight[:, slow] += 0.06 * notes.T
    second.q_proj.weight[slow] += names
    second.k_proj.weight[slow] += notes
    second.v_proj.weight[:d] += copies
    second.o_proj.weight[:, :d] += 0.1 * copies.T


def vocabulary(family: str = "household") -> list[str]:
    """All words of the family's texts and of its compact prompt, most general first."""
    if family == "webshop":
        from hiper_fast.envs.webshop.generate import vocabulary
        from hiper_fast.shop_prompt import COMPACT_WORDS
    else:
        from hiper_fast.envs.household import vocabulary
        from hiper_fast.prompt import COMPACT_WORDS
    return list(dict.fromkeys([*COMPACT_WORDS, *vocabulary()]))


if __name__ == "__main__":
    for family, folder in FOLDERS.items():
        folder.mkdir(exist_ok=True)
        build_tokenizer(vocabulary(family), OPENINGS[family]).backend_tokenizer.save(str(folder / "tokenizer.json"))
