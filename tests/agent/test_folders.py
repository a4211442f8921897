"""Model folders as people have them: with code, with pickles, moved, merged, incomplete."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_policy import IDS, load, save_model
from transformers import AutoConfig
from transformers.utils import logging

from hiper_fast.agent.footprint import find_architecture
from hiper_fast.options import ConfigError

READERS = {
    "load": load,
    "plan": lambda folder: find_architecture(str(folder), None, True),
}


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", "llama")
    return tmp_path / "model"


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def adapters(folder, peft):
    """A folder of adapters on the model in `folder`, with their tokenizer."""
    agent = load(folder, lora_rank=2)
    with torch.no_grad():
        for name, weight in agent.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    agent.model.save_pretrained(folder.parent / "adapters")
    agent.tokenizer.save_pretrained(folder.parent / "adapters")
    return folder.parent / "adapters"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def silent_stdin(monkeypatch):
    """A person who would say yes, and must not be asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))


@pytest.mark.parametrize("read", READERS)
def test_a_model_with_code_of_its_own_is_refused_without_a_question(folder, silent_stdin, read):
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own", auto_map=own)
    (folder / "own.py").write_text("raise SystemExit('ran')")
    said = (
        f"model.path: cannot load {re.escape(str(folder))}: it needs code of its own, and none is"
    )
    with pytest.raises(ConfigError, match=said) as caught:
        READERS[read](folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_refused_too(folder, silent_stdin):
    own = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    (folder / "own.py").write_text("raise SystemExit('ran')")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="model.path: cannot load"):
        load(folder)


class Bomb:
    def __reduce__(self):
        return sys.exit, ("unpickled",)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pth"])
def test_pickled_weights_are_refused_unopened_with_the_mend(folder, read, name):
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / name)
    with pytest.raises(
        ConfigError, match=f"has pickled weights only .{name}.*save_pretrained them"
    ) as caught:
        READERS[read](folder)
    assert "\n" not in str(caught.value)


def test_pickles_beside_safetensors_are_left_alone(folder):
    expected = load(folder).model(input_ids=IDS).logits
    torch.save(Bomb(), folder / "training_args.bin")
    torch.save(Bomb(), folder / "pytorch_model.bin")
    assert torch.equal(load(folder).model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("read", READERS)
def test_adapters_whose_base_has_moved_say_where_it_was_and_how_to_go_on(folder, adapters, read):
    expected = load(adapters).model(input_ids=IDS).logits
    moved = folder.rename(folder.with_name("elsewhere"))
    file = adapters / "adapter_config.json"
    said = f"{adapters} is no longer at {folder}; move it back, or .* base_model_name_or_path into {file}"
    with pytest.raises(ConfigError, match=said):
        READERS[read](adapters)
    edit(file, base_model_name_or_path=str(moved))
    assert torch.equal(load(adapters).model(input_ids=IDS).logits, expected)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="adapter_config.json names no base model"):
        READERS[read](adapters)


def test_pickled_adapters_and_bases_are_refused(folder, adapters):
    torch.save(Bomb(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"{folder} has pickled weights only"):
        load(adapters)
    (adapters / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapters / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickled weights only .adapter_model.bin"):
        load(adapters)


def test_merged_as_the_docs_say_a_folder_loads_with_its_tokenizer(adapters, tmp_path, monkeypatch):
    """docs/policy.md's own lines."""
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    [code] = re.findall(r"```python\n(from peft .*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/mine/checkpoints/step-000150", str(adapters)))
    merged, parts = load(tmp_path / "merged"), load(adapters)
    assert (
        merged.tokenizer("go to desk 1")["input_ids"]
        == parts.tokenizer("go to desk 1")["input_ids"]
    )
    with torch.no_grad():
        ours, theirs = (agent.model(input_ids=IDS).logits for agent in (merged, parts))
    torch.testing.assert_close(ours, theirs)


def test_transformers_says_nothing_while_a_model_loads_and_may_speak_afterwards(folder, capfd):
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load(folder)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_weights_that_would_be_random_are_an_error_now_that_nobody_warns(folder):
    edit(
        folder / "config.json",
        num_hidden_layers=AutoConfig.from_pretrained(folder).num_hidden_layers + 1,
    )
    with pytest.raises(
        ConfigError, match="its weights lack model.layers.* and 8 more, .* random; save"
    ):
        load(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"model_type": null}', '{"policy": {"state": {}}}']
)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_config_that_names_no_type_is_no_guess(folder, read, content):
    """transformers would take a type from the folder's name, and build it at its full size."""
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^model.path: .*config.json names no model_type"):
        read(folder)
