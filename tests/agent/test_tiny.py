"""The embedded model and its tokenizer."""

import random
import re

import pytest
import torch
from helpers import HOUSEHOLD
from tokenizers import AddedToken, normalizers, pre_tokenizers

from hiper_fast.agent import tiny
from hiper_fast.agent.loading import load_agent
from hiper_fast.config import ModelConfig
from hiper_fast.envs import household
from hiper_fast.ops import TokenPieces
from hiper_fast.tokenizers import build_tokenizers


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load_tokenizer(HOUSEHOLD.tokenizer)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_texts():
    rng = random.Random(0)
    ranges = [
        (32, 127),
        (0, 32),
        (0xA0, 0x250),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F6FF),
        (0x600, 0x700),
    ]
    for _ in range(200):
        low, high = rng.choice(ranges)
        yield "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(0, 40)))


EDGES = [
    *(
        "",
        " ",
        "  a  b ",
        "\n\n\t \r\n",
        "don't stop",
        "cabinet 63",
        "cabinet 640",
        "007",
        "İ",
        "e\u0301",
    ),
    *(
        "<switch>",
        "<switch >",
        "</action",
        "<unknown>",
        "a<subgoal>b</subgoal>c",
        "\x00",
        "\u2028",
        "🧑‍🍳",
    ),
    "<|end|> is a special token's name",
]


def test_decoding_gives_any_text_back(tokenizer):
    for text in [*EDGES, *random_texts()]:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_pieces_are_the_bytes_of_the_text(tokenizer):
    pieces = TokenPieces(tokenizer)
    for text in [*EDGES[:-1], *random_texts()]:
        assert b"".join(pieces[i] for i in ids_of(tokenizer, text)) == text.encode()


def test_cut_before_a_space_or_a_new_line_a_text_has_the_same_ids(tokenizer):
    assert tiny.cuts_before_blanks(tokenizer)
    for text in [*EDGES, *random_texts(), "a \x1c\n  <|end|> b</a \r\n 12 \u2028 search[x] \n"]:
        parts = re.split("(?=[ \n])", text)
        assert [i for part in parts for i in ids_of(tokenizer, part)] == ids_of(tokenizer, text)


def change_split(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "change",
    [
        change_split,
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: backend.add_tokens(["go to"]),
        lambda backend: backend.add_tokens([AddedToken("mug", lstrip=True)]),
        lambda backend: backend.enable_truncation(5),
    ],
)
def test_a_tokenizer_that_may_look_beyond_a_blank_is_not_cut_there(change):
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    change(tokenizer.backend_tokenizer)
    assert not tiny.cuts_before_blanks(tokenizer)


@pytest.mark.parametrize("before", ["", " "])
def test_each_household_word_is_one_token(tokenizer, before):
    words = [w for w in household.vocabulary() if w.isalpha()]
    assert len(words) > 150
    assert [w for w in words if len(ids_of(tokenizer, before + w)) != 1] == []
    assert all(len(ids_of(tokenizer, before + str(n))) == 1 for n in range(64))


def test_each_tag_is_one_token(tokenizer):
    for name in ("switch", "subgoal", "action"):
        for tag in (f"<{name}>", f"</{name}>"):
            assert len(ids_of(tokenizer, tag)) == 1
            assert len(ids_of(tokenizer, f"KEEP{tag}find")) == 3


def test_a_whole_game_falls_back_to_bytes_nowhere(tokenizer):
    letters = set(range(2, 258))  # after padding and end come the 256 single bytes
    for seed in range(20):
        env = household.Household()
        text, info = env.reset(seed=seed)
        texts = [text, info["task"], *info["admissible_commands"], *env.content["subgoals"]]
        for command in env.content["walkthrough"]:
            obs, *_, info = env.step(command)
            texts += [obs, *info["admissible_commands"]]
        spelled = {
            tokenizer.decode([i]) for text in texts for i in ids_of(tokenizer, text) if i in letters
        }
        assert not any(s.strip().isalnum() for s in spelled), spelled


def test_the_shipped_files_are_what_a_rebuild_gives(tmp_path):
    rebuilt = dict(build_tokenizers())
    assert {file.parent.name for file in rebuilt} == {"alfworld", "webshop"}
    for shipped, tokenizer in rebuilt.items():
        tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert (tmp_path / "tokenizer.json").read_bytes() == shipped.read_bytes(), shipped


def test_without_a_file_tags_are_tokens_and_all_else_is_bytes():
    tokenizer = tiny.build_tokenizer([], [])
    assert len(ids_of(tokenizer, "<action>go</action>")) == 4
    for text in EDGES:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_special_tokens(tokenizer):
    assert tokenizer.decode([tokenizer.eos_token_id]) == tiny.END
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.chat_template is None


def test_weights_depend_on_the_seed_alone(tokenizer):
    before = torch.get_rng_state()
    first, again, other = (tiny.build_model(tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_starts_by_copying(tokenizer, seed):
    """Untrained, it attends to what followed the present token earlier, and prefers that to nearly all others."""
    model = tiny.build_model(tokenizer, seed)
    model.set_attn_implementation("eager")
    prompt = (
        "task: put some egg on shelf.\nsee: On the bed 1, you see pen 4.\n"
        "go to desk 2\ntake keychain 3 from safe 1\n"
    )
    ids = torch.tensor([ids_of(tokenizer, prompt + "<action>take keychain 3 from safe 1")])
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    last = ids.shape[1] - 1
    back, copying = (attention[0, 0] for attention in out.attentions)
    assert back[range(1, last + 1), range(last)].min() > 0.5, "the first head looks one token back"
    for place in range(last - 5, last):  # take, keychain, 3, from, safe
        source = (ids[0, :place] == ids[0, place]).nonzero()[-1] + 1
        assert ids[0, source] == ids[0, place + 1]
        assert copying[place].argmax() == source
        better = (out.logits[0, place] > out.logits[0, place, ids[0, source]]).sum()
        assert better < 0.05 * len(tokenizer)


def test_size_is_around_half_a_million(tokenizer):
    model = tiny.build_model(tokenizer, 0)
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 900_000
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_saved_folder_loads_with_the_same_tokenizer_and_weights(tokenizer, tmp_path):
    """AutoTokenizer puts a tokenizer of its own over some model types' folders."""
    model = tiny.build_model(tokenizer, 3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    agent = load_agent(ModelConfig(path=str(tmp_path), device="cpu"), seed=0)
    text = "<switch>KEEP</switch> go to fridge 1, Zürich ->  [UNK]\n"
    assert ids_of(agent.tokenizer, text) == ids_of(tokenizer, text)
    assert agent.stop_ids == (tokenizer.eos_token_id,) and not agent.tiny
    assert all(torch.equal(agent.model.state_dict()[k], v) for k, v in model.state_dict().items())
