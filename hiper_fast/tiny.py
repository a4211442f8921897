"""The embedded default model: a Qwen3-type causal LM of 0.4 million parameters and a word tokenizer, from scratch.

`python -m hiper_fast.tiny` writes the shipped tokenizers anew.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hiper_fast.ops.find_roles import byte_level_alphabet

HERE = Path(__file__).parent
FOLDERS = {"household": HERE / "tiny_tokenizer", "webshop": HERE / "tiny_tokenizer_webshop"}
END, PAD = "<|end|>", "<|pad|>"
TAGS = [f"<{slash}{name}>" for name in ("switch", "subgoal", "action") for slash in ("", "/")]
SPLIT = r"</?[a-z]+>| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A lossless tokenizer: each word of `words`, alone and after a space, is one token; all else is bytes."""
    letters = byte_level_alphabet()
    pieces = [p for word in dict.fromkeys([*words, *map(str, range(64))]) for p in (word, " " + word)]
    encoded = ["".join(letters[b] for b in piece.encode()) for piece in [*TAGS, *pieces]]
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
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


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
        build_tokenizer(vocabulary(family)).backend_tokenizer.save(str(folder / "tokenizer.json"))
