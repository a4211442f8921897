"""find_roles against its reference on odd tokenisations, and TokenPieces on kinds of tokenizers."""

import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hiper_fast import ops
from hiper_fast.response import parse

TEXT = "<switch>SWITCH</switch><subgoal>find the mug</subgoal><action>go to desk 1</action>"
OTHERS = [
    "take mug 1 from desk 1",
    "naïve café — 水を飲む 😀",
    "<switch>KEEP</switch>",
    "a\n\tb  c",
]


def run(texts_of_tokens, pieces=None, implementation=ops.find_roles):
    """Each response is a list of byte strings, one per token; the roles come as a list per response."""
    table = (
        sorted({t for response in texts_of_tokens for t in response}) if pieces is None else pieces
    )
    pieces = ops.TokenPieces.from_bytes(table)
    index = {piece: i for i, piece in enumerate(table)}
    ids = torch.tensor(
        [index[t] for response in texts_of_tokens for t in response], dtype=torch.int64
    )
    cu_tokens = torch.tensor([0, *map(len, texts_of_tokens)]).cumsum(0).to(torch.int32)
    roles, switch, value_index, valid = implementation(ids, cu_tokens, pieces)
    return [r.tolist() for r in roles.split(cu_tokens.diff().tolist())], switch, value_index, valid


@pytest.mark.parametrize("implementation", [ops.find_roles, ops.reference.find_roles])
class TestByHand:
    def test_whole_tags(self, implementation):
        tokens = [b"<switch>", b"KEEP", b"</switch>", b" ", b"<subgoal>", b"x", b"</subgoal>",
                  b"<action>", b"y", b"</action>", b""]  # fmt: skip
        roles, switch, value_index, valid = run([tokens], implementation=implementation)
        assert roles == [[4, 4, 4, 0, 2, 2, 2, 1, 1, 1, 0]]
        assert (switch.tolist(), valid.tolist()) == ([False], [True])
        assert value_index.tolist() == [[7, 0, 0]]

    def test_a_token_across_two_blocks_has_both_roles(self, implementation):
        tokens = [
            b"<switch",
            b">Sw",
            b"itch</switch",
            b"><",
            b"subgoal>x</subgoal",
            b"><",
            b"action>y</action",
            b">.",
        ]
        roles, switch, value_index, valid = run([tokens], implementation=implementation)
        assert roles == [[4, 4, 4, 6, 2, 3, 1, 1]]
        assert (switch.tolist(), valid.tolist()) == ([True], [True])
        assert value_index.tolist() == [[6, 0, 0]]

    def test_without_an_action_block_all_tokens_act(self, implementation):
        tokens = [b"<switch>", b"KEEP", b"</switch>", b"", b"<action>", b"y"]
        roles, _, value_index, valid = run([tokens], implementation=implementation)
        assert roles == [[5, 5, 5, 1, 1, 1]]
        assert valid.tolist() == [False] and value_index.tolist() == [[3, 0, 0]]

    def test_the_low_value_position_falls_back(self, implementation):
        responses = [
            [
                b"<switch>K</switch>",
                b"a",
                b"<subgoal>b</subgoal>",
            ],  # no token after </subgoal>: after </switch>
            [b"a<switch>K</switch>"],  # none after either: the first
            [b"abc", b"d"],  # no block: the first
            [],
            [b"<subgoal>b</subgoal>", b"", b"d"],  # a token without bytes follows all the same
        ]
        value_index = run(responses, implementation=implementation)[2]
        assert value_index.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]

    def test_no_turns(self, implementation):
        roles, switch, value_index, valid = implementation(
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int32),
            ops.TokenPieces.from_bytes([b"a"]),
        )
        assert (roles.shape, switch.shape, value_index.shape, valid.shape) == (
            (0,),
            (0,),
            (0, 3),
            (0,),
        )
        assert value_index.dtype == torch.int32 and roles.dtype == torch.uint8


def odd_response(rng):
    """Bytes of a response that may lack, nest, repeat or break anything, cut into tokens at random places."""
    tags = [
        f"<{slash}{name}>".encode()
        for name in ("switch", "subgoal", "action")
        for slash in ("", "/")
    ]
    words = [
        b"KEEP",
        b"SWITCH",
        b"keep ",
        b"KE P",
        b"\n",
        b" ",
        b"",
        b"go to desk 1",
        b"<",
        b">",
        b"/",
        b"</",
    ]
    words += [
        b"<<action>",
        b"<switch",
        b"switch>",
        "水".encode(),
        "é😀".encode(),
        b"\xe6\xb0",
        b"\xff",
        b"\x80",
    ]
    if rng.random() < 0.5:
        parts = []
        for name, word in (
            ("switch", rng.choice([b"KEEP", b"switch", b" "])),
            ("subgoal", b"x"),
            ("action", b"y"),
        ):
            parts += [
                f"<{name}>".encode(),
                word,
                f"</{name}>".encode(),
                rng.choice([b"", b"", b" "]),
            ]
        for _ in range(rng.choice([0, 0, 1, 3])):
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(words + tags))
    else:
        parts = [rng.choice(rng.choice([tags, words])) for _ in range(rng.randrange(25))]
    data = b"".join(parts)
    tokens, at = [], 0
    while at < len(data):
        length = rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 40])
        tokens.append(data[at : at + length])
        at += length
    return tokens + [b""] * rng.randrange(2)


def test_switch_and_validity_at_the_edges():
    words = [
        "KEEP",
        "KE EP",
        "KE P",
        "S WITCH",
        "switch\v",
        "\x0bKeep\x0c",
        "\x1cKEEP",
        "KEEPS",
        "SWITCHES",
        "\0KEEP",
    ]
    after = ["", "\u4dff", "\u4e00", "\u9fff", "\ua000", "\u3fff", "é"]
    texts = [
        f"<switch>{w}</switch><subgoal>a</subgoal><action>b</action>{c}"
        for w in words
        for c in after
    ]
    for tokens in (
        [[t.encode()] for t in texts],
        [[bytes([b]) for b in t.encode()] for t in texts],
    ):
        _, switch, _, valid = run(tokens)
        parsed = [parse(t) for t in texts]
        assert switch.tolist() == [p.switch for p in parsed]
        assert valid.tolist() == [p.valid for p in parsed]


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference_on_odd_responses(seed):
    rng = random.Random(seed)
    responses = [odd_response(rng) for _ in range(300)]
    result, expected = run(responses), run(responses, implementation=ops.reference.find_roles)
    for tokens, roles, wanted in zip(responses, result[0], expected[0], strict=True):
        assert roles == wanted, tokens
    for x, y in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(x, y)
    assert 0.05 < expected[3].float().mean() < 0.95 and 0.05 < expected[1].float().mean() < 0.95


def byte_level(merges=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 if merges else 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *OTHERS] * 3, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece_style():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    letters = sorted(set(TEXT.replace(" ", "▁")) | set("abcdefghijklmnopqrstuvwxyz▁"))
    merges = [("s", "w"), ("a", "c"), (">", "<"), ("▁", "t"), ("▁t", "h")]
    vocab = {
        t: i for i, t in enumerate(["<unk>", *bytes_, *letters, *("".join(m) for m in merges)])
    }
    tokenizer.model = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=False
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize(
    "make", [byte_level, lambda: byte_level(merges=False), sentencepiece_style]
)
def test_pieces_spell_what_was_encoded(make):
    tokenizer = make()
    pieces = ops.TokenPieces(tokenizer)
    for text in [TEXT, *OTHERS]:
        assert b"".join(pieces[i] for i in tokenizer.encode(text).ids) == text.encode()
    assert len(pieces) == tokenizer.get_vocab_size()


def test_pieces_of_added_tokens():
    tokenizer = byte_level()
    pieces = ops.TokenPieces(tokenizer, size=1000)
    assert pieces[tokenizer.token_to_id("<|im_end|>")] == b""
    assert pieces[tokenizer.token_to_id("<think>")] == b"<think>"
    assert len(pieces) == 1000 and pieces[999] == b""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<think>"
    )
    assert ops.TokenPieces(wrapped)[tokenizer.token_to_id("<think>")] == b""  # special now
    assert ops.TokenPieces(wrapped)[5] == pieces[5]


def test_pieces_of_words():
    vocab = {"go": 0, "##ing": 1, "[UNK]": 2}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    assert [ops.TokenPieces(words)[i] for i in (0, 2)] == [b" go", b" [UNK]"]
    words.decoder = decoders.WordPiece()
    assert [ops.TokenPieces(words)[i] for i in (0, 1)] == [b" go", b"ing"]


def test_pieces_that_cannot_be_known():
    tokenizer = byte_level()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="tokenizer.*CTC"):
        ops.TokenPieces(tokenizer)
    with pytest.raises(ValueError, match="tokenizer.*object"):
        ops.TokenPieces(object())


@pytest.mark.parametrize("make", [byte_level, sentencepiece_style])
def test_with_real_tokenizers(make):
    tokenizer = make()
    pieces = ops.TokenPieces(tokenizer)
    encoded = [tokenizer.encode(text).ids for text in [TEXT, *OTHERS, TEXT + " 水", ""]]
    ids = torch.tensor([i for ids in encoded for i in ids], dtype=torch.int32)
    cu_tokens = torch.tensor([0, *map(len, encoded)]).cumsum(0).to(torch.int32)
    result = ops.find_roles(ids, cu_tokens, pieces)
    for x, y in zip(result, ops.reference.find_roles(ids, cu_tokens, pieces), strict=True):
        assert torch.equal(x, y)
    assert result[3].tolist() == [True] + [False] * 6
    assert result[1].tolist() == [True] + [False] * 4 + [True, False]
    padded = torch.stack([ids, ids], 1)[:, 0]
    assert torch.equal(ops.find_roles(padded, cu_tokens, pieces)[0], result[0])


def test_opcheck():
    pieces = ops.TokenPieces.from_bytes([b"<action>", b"y", b"</action>"])
    ids, cu_tokens = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 3, 4], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.hiper_fast.find_roles.default,
        (ids, cu_tokens, pieces.bytes, pieces.offsets, pieces.flags),
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("token_ids", {"token_ids": torch.tensor([0, 3])}),
        ("token_ids", {"token_ids": torch.tensor([0, -1])}),
        ("token_ids", {"token_ids": torch.tensor([0.0, 1.0])}),
        ("token_ids", {"token_ids": torch.zeros(1, 2, dtype=torch.int64)}),
        ("cu_tokens", {"cu_tokens": torch.tensor([0, 1])}),
        ("cu_tokens", {"cu_tokens": torch.tensor([0, 1], dtype=torch.int32)}),
        ("cu_tokens", {"cu_tokens": torch.tensor([0, 3, 2], dtype=torch.int32)}),
        ("pieces", {"pieces": [b"a", b"b", b"c"]}),
    ],
)
def test_bad_arguments_are_named(name, change):
    given = {
        "token_ids": torch.tensor([0, 1]),
        "cu_tokens": torch.tensor([0, 1, 2], dtype=torch.int32),
        "pieces": ops.TokenPieces.from_bytes([b"a", b"b", b"c"]),
    }
    with pytest.raises(ValueError, match=name):
        ops.find_roles(**(given | change))
