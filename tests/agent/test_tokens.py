"""What a tokenizer must share with its model and the response format, before anything is played."""

import json

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hiper_fast import ops
from hiper_fast.agent import tiny
from hiper_fast.agent.tokens import (
    check_length,
    check_tags,
    check_tokenizer,
    list_pieces,
    vocabulary_size,
)
from hiper_fast.config import AgentConfig
from hiper_fast.configure import list_recipes, resolve
from hiper_fast.options import ConfigError


def make_tokenizer():
    """Bytes, the tags and numbers."""
    return tiny.build_tokenizer([], [])


def make_spelling():
    """Bytes alone: every tag is split."""
    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_words():
    """Words by a space each, as BERT's."""
    words = "switch subgoal action find click mug 1 < > / [ ] [UNK]".split()
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def check(tokenizer, **options):
    check_tags(tokenizer, ops.TokenPieces(tokenizer), AgentConfig(**options))


@pytest.mark.parametrize("make", [make_tokenizer, make_spelling])
def test_tags_of_one_token_or_many_pass(make):
    check(make())
    check(make(), subgoals=False)


def test_tags_that_were_added_as_ordinary_tokens_pass():
    tokenizer = make_spelling()
    tokenizer.add_tokens(tiny.TAGS)
    assert len(tokenizer("<action>")["input_ids"]) == 1
    check(tokenizer)


@pytest.mark.parametrize("make", [make_tokenizer, make_spelling])
def test_tags_that_are_special_tokens_are_refused_by_name(make):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<switch>", "</subgoal>")])
    with pytest.raises(ConfigError, match="<switch> </subgoal> are special tokens") as error:
        check(tokenizer)
    assert '"special": false' in str(error.value) and "<action>" not in str(error.value)
    check(tokenizer, subgoals=False)


def test_a_tag_that_ends_responses_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "</action>"
    for subgoals in (True, False):
        with pytest.raises(ConfigError, match="</action> are special tokens"):
            check(tokenizer, subgoals=subgoals)


def test_the_mend_of_special_tags_holds(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<switch>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] &= token["content"] != "<switch>"
    file.write_text(json.dumps(content))
    check(transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_that_cannot_write_tags_is_refused():
    with pytest.raises(ConfigError, match="its tokenizer cannot write <switch> </switch>") as error:
        check(make_words())
    assert "< switch >" in str(error.value)
    tokenizer = make_words()
    tokenizer.add_tokens(tiny.TAGS)
    with pytest.raises(ConfigError, match="cannot write commands: .* click \\[ mug 1 \\]</action>"):
        check(tokenizer)


# Ids and embeddings.


def test_the_vocabularys_size_is_its_largest_id_and_one():
    tokenizer = make_spelling()
    assert vocabulary_size(tokenizer) == 256
    tokenizer.add_tokens(["one more"])
    assert vocabulary_size(tokenizer) == 257
    holes = Tokenizer(models.WordLevel({"a": 0, "b": 999}, unk_token="a"))
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=holes)) == 1000


def test_a_tokenizer_longer_than_the_embedding_is_refused():
    tokenizer = make_spelling()
    for rows in (256, 257, 1000):
        check_tokenizer(tokenizer, rows)
    with pytest.raises(ConfigError, match="ids up to 255, its embedding 255 rows"):
        check_tokenizer(tokenizer, 255)


def test_the_bytes_of_every_row_or_the_reason_why_not():
    assert len(list_pieces(make_spelling(), 300)) == 300
    with pytest.raises(ConfigError, match="ids up to 255, its embedding 255 rows"):
        list_pieces(make_spelling(), 255)
    tokenizer = make_words()
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(ConfigError, match="model.path: tokenizer: .*CTC.*; use a model"):
        list_pieces(tokenizer, 300)


# Positions.


def agent_config(prompt=3000, response=1000, **options):
    return AgentConfig(max_prompt_tokens=prompt, max_response_tokens=response, **options)


@pytest.mark.parametrize(
    "model, limit",
    [
        (transformers.LlamaConfig(max_position_embeddings=4000), 4000),
        (transformers.GPT2Config(n_positions=4000), 4000),
        (transformers.LlavaConfig(text_config={"model_type": "llama", "max_position_embeddings": 4000}), 4000),
        (transformers.FalconConfig(max_position_embeddings=10, alibi=True), None),
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
@pytest.mark.parametrize("style", ["reference", "transcript"])
def test_sequences_that_outgrow_a_models_positions_are_refused(model, limit, style):
    check_length(model, agent_config(style=style))
    if limit is None:
        check_length(model, agent_config(10**9, style=style))
        return
    with pytest.raises(ConfigError, match=r"3001 \+ 1000 tokens .*4000.*_tokens to 3000") as error:
        check_length(model, agent_config(3001, style=style))
    assert "agent.max_prompt_tokens, agent.max_response_tokens" in str(error.value)
    with pytest.raises(ConfigError, match="lower both"):
        check_length(model, agent_config(1, 4000, style=style))


def test_defaults_and_recipes_fit_their_models():
    tokenizer = make_tokenizer()
    check_length(tiny.build_model(tokenizer, 0).config, AgentConfig())
    qwen = transformers.Qwen2Config(max_position_embeddings=32768)
    for name in list_recipes():
        check_length(qwen, resolve([name], {"model.device": "cpu"}).agent)
