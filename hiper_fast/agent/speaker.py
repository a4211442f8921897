"""How a policy reads and writes text, wherever its weights are."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hiper_fast import ops
from hiper_fast.distributed import ALONE, World
from hiper_fast.ops import TokenPieces
from hiper_fast.options import ConfigError


class Speaker:
    """A tokenizer, the bytes of its tokens (`pieces`), and those that end a response (`stop_ids`).

    ConfigError where none does.
    """

    model = critic = None  # networks, where they are here

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pieces: TokenPieces,
        stop_ids: tuple[int, ...],
        world: World = ALONE,
    ):
        self.tokenizer, self.pieces, self.stop_ids, self.world = tokenizer, pieces, stop_ids, world
        if not stop_ids:
            raise ConfigError(
                f"model.path: {tokenizer.name_or_path} names no end-of-sequence token; set one in its "
                "tokenizer's configuration"
            )

    def decode(self, ids: list[int]) -> bytes:
        """The text of a response, special tokens left out; the same bytes `find_roles` reads."""
        return b"".join(self.pieces[i] for i in ids)

    def find_roles(self, response_ids: Tensor, cu_tokens: Tensor):
        return ops.find_roles(response_ids, cu_tokens, self.pieces)
