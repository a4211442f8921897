"""Which level trains each response token, read straight from token ids."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import check_cu, check_vector
from hiper_fast.ops._numbers import check_count

# What the kernel must know of a piece before it looks into its bytes.
_HAS_ANGLE, _HAS_HIGH_BYTE, _EMPTY = 1, 2, 4


class TokenPieces:
    """Every token's bytes, built once: `pieces[id]` is what the token adds to the text.

    Special tokens (end, padding, chat markers) have no bytes; other added tokens have their text.

    Args:
        tokenizer: a transformers tokenizer backed by the tokenizers library, or a `tokenizers.Tokenizer`.
            Decoders of byte-level BPE (GPT-2, Llama 3, Qwen), sentencepiece-style BPE and unigram (▁,
            <0x0A>), WordPiece and plain words are understood. Where the decoder joins or trims words by
            their neighbours, each word keeps its own leading space.
        size: the number of rows of the model's embedding where that is more than the tokenizer has;
            the ids that fill it up have no bytes.

    Raises:
        ValueError: if a token's bytes cannot be known from the tokenizer, or naming size.
    """

    def __init__(self, tokenizer, size: int | None = None):
        if size is not None:
            check_count("size", size)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} has no tokenizers backend; load a fast tokenizer"
            )
        specification = json.loads(backend.to_str())
        piece_of = _make_piece_decoder(specification.get("decoder"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        found = {id: piece_of(token) for token, id in vocabulary.items()}
        for added in specification["added_tokens"]:
            found[added["id"]] = b"" if added["special"] else added["content"].encode()
        for id in getattr(tokenizer, "all_special_ids", ()):
            found[id] = b""
        length = max(found, default=-1) + 1
        self._fill([found.get(id, b"") for id in range(max(length, size or 0))])

    @classmethod
    def from_bytes(cls, pieces: Sequence[bytes]) -> TokenPieces:
        """From each id's bytes, in order of ids."""
        self = cls.__new__(cls)
        self._fill(list(pieces))
        return self

    def _fill(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.bytes = torch.tensor(list(b"".join(pieces)), dtype=torch.uint8)
        self.offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(torch.int32)
        flags = [
            _HAS_ANGLE * (b"<" in piece)
            | _HAS_HIGH_BYTE * (not piece.isascii())
            | _EMPTY * (not piece)
            for piece in pieces
        ]
        self.flags = torch.tensor(flags, dtype=torch.uint8)
        self._on = {torch.device("cpu"): (self.bytes, self.offsets, self.flags)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(bytes, offsets, flags) on that device, copied there once."""
        if device not in self._on:
            self._on[device] = tuple(tensor.to(device) for tensor in self._on[torch.device("cpu")])
        return self._on[device]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, id: int) -> bytes:
        return self._pieces[id]


def byte_level_alphabet() -> list[str]:
    """GPT-2's map: byte -> the printable character that stands for it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_level_alphabet())}


def _decode_byte_level(token: str, step: dict) -> str | bytes:
    known = all(character in _BYTE_OF for character in token)
    return bytes(_BYTE_OF[character] for character in token) if known else token


def _decode_byte_fallback(token: str, step: dict) -> str | bytes:
    if len(token) != len("<0x0A>") or not token.startswith("<0x") or not token.endswith(">"):
        return token
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return token


def _decode_word_piece(token: str, step: dict) -> str:
    prefix = step["prefix"]
    return token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"


_DECODE = {
    "ByteLevel": _decode_byte_level,
    "ByteFallback": _decode_byte_fallback,
    "Metaspace": lambda token, step: token.replace(step["replacement"], " "),
    "Replace": lambda token, step: token.replace(step["pattern"]["String"], step["content"]),
    "WordPiece": _decode_word_piece,
    "BPEDecoder": lambda token, step: token.replace(step["suffix"], " "),
}
_ON_THE_WHOLE_TEXT = {"Fuse", "Strip"}  # they trim a leading space at most


def _make_piece_decoder(decoder: dict | None) -> Callable[[str], bytes]:
    """Token -> bytes, by the steps of a serialised tokenizers decoder that act on each token alone."""
    if decoder is None:
        return lambda token: f" {token}".encode()  # tokenizers joins by spaces
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        regex = step["type"] == "Replace" and "String" not in step["pattern"]
        if step["type"] not in _DECODE.keys() | _ON_THE_WHOLE_TEXT or regex:
            kind = "Replace with a regular expression" if regex else step["type"]
            raise ValueError(
                f"tokenizer: the bytes of a token are not known for its decoder ({kind})"
            )
    alone = list(itertools.takewhile(lambda step: step["type"] in _DECODE, steps))

    def decode(token: str) -> bytes:
        for step in alone:
            token = _DECODE[step["type"]](token, step)
            if isinstance(token, bytes):
                return token
        return token.encode()

    return decode


def _check(token_ids, cu_tokens, *_):
    check_vector("token_ids", token_ids, None, (torch.int64, torch.int32), None)
    check_cu("cu_tokens", cu_tokens, token_ids.device)


def _run_reference(token_ids, cu_tokens, piece_bytes, piece_offsets, piece_flags):
    _library.check_prefix_sum("cu_tokens", cu_tokens, token_ids.shape[0])
    data, offsets = piece_bytes.numpy().tobytes(), piece_offsets.tolist()
    pieces = {}
    for id in token_ids.unique().tolist():
        if not 0 <= id < len(offsets) - 1:
            raise ValueError(
                f"token_ids: {id} is not in the vocabulary of {len(offsets) - 1} pieces"
            )
        pieces[id] = data[offsets[id] : offsets[id + 1]]
    return reference.find_roles(token_ids, cu_tokens, pieces)


def _fake(token_ids, cu_tokens, *_):
    tokens, turns = token_ids.shape[0], cu_tokens.shape[0] - 1
    return (
        token_ids.new_empty(tokens, dtype=torch.uint8),
        token_ids.new_empty(turns, dtype=torch.bool),
        token_ids.new_empty((turns, 3), dtype=torch.int32),
        token_ids.new_empty(turns, dtype=torch.bool),
    )


_op = _library.define(
    "find_roles(Tensor token_ids, Tensor cu_tokens, Tensor piece_bytes, Tensor piece_offsets, "
    "Tensor piece_flags) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    plain=_run_reference,
    fake=_fake,
)


def find_roles(
    token_ids: Tensor, cu_tokens: Tensor, pieces: TokenPieces
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every response token's role, and what the parser of `hiper_fast.response` says of every response.

    A token has a block's role if at least one of its bytes lies in the block, tags included, so that one
    token can have several. All tokens of a response without an action block have the action role.

    Args:
        token_ids: int32 or int64 [tokens], the responses without their prompts.
        cu_tokens: int32 [turns + 1], exclusive prefix sum of each response's tokens.
        pieces: the tokenizer's bytes.

    Returns:
        roles: uint8 [tokens], bits 1 action, 2 subgoal, 4 switch.
        switch: bool [turns], the response opens a segment.
        value_index: int32 [turns, 3], columns low, high, switch: the position, within the response,
            of the token before which that value is read. With index i of a response that starts at
            position s of its sequence, the value comes from the hidden state at s + i - 1. High and
            switch: 0. Low: the first token that starts at or after the end of `</subgoal>`; where
            there is no such block or no token after it, the same for `</switch>`; else 0.
        valid: bool [turns].

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    if not isinstance(pieces, TokenPieces):
        raise ValueError(f"pieces must be ops.TokenPieces(tokenizer), got {type(pieces).__name__}")
    device = token_ids.device if isinstance(token_ids, Tensor) else torch.device("cpu")
    return _op(token_ids, cu_tokens, *pieces.on(device))
