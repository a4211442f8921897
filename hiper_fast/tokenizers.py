"""Writes the tiny model's shipped tokenizers anew, from their families' words.

python -m hiper_fast.tokenizers
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hiper_fast.agent.tiny import build_tokenizer
from hiper_fast.envs.family import families


def build_tokenizers() -> Iterator[tuple[Path, PreTrainedTokenizerFast]]:
    """The file of each family that has words of its own, and what belongs there."""
    for name in families.names():
        family = families.find(name)
        if "list_words" in vars(family) and family.tokenizer:
            yield family.tokenizer, build_tokenizer(*family.list_words())


if __name__ == "__main__":
    for file, tokenizer in build_tokenizers():
        tokenizer.backend_tokenizer.save(str(file))
