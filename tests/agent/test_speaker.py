"""What is known of a policy whose weights are elsewhere."""

import pytest
from helpers import configure, make_tiny

from hiper_fast.agent.loading import load_speaker
from hiper_fast.options import ConfigError


def load(path):
    config = configure(model__path=str(path))
    return load_speaker(config.model, config.agent)


def test_a_tokenizer_is_all_that_is_read(tmp_path):
    agent = make_tiny()
    agent.tokenizer.save_pretrained(tmp_path)
    speaker = load(tmp_path)
    ids = agent.tokenizer("<action>go to desk 1</action>", add_special_tokens=False)["input_ids"]
    assert speaker.decode(ids) == agent.decode(ids) == b"<action>go to desk 1</action>"
    assert speaker.stop_ids == agent.stop_ids and speaker.model is None


def test_without_a_tokenizer_there_is_no_speaker(tmp_path):
    with pytest.raises(ConfigError, match="model.path: cannot load"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="model.path: tiny is built here; name the model"):
        load("tiny")


def test_responses_need_an_end(tmp_path):
    tokenizer = make_tiny().tokenizer
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no end-of-sequence token"):
        load(tmp_path)
