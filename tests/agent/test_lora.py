"""Adapters merged into the weights that they work on."""

import copy

import pytest
import torch
import transformers

from hiper_fast.agent import lora

peft = pytest.importorskip("peft")

SIZES = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "lm_head", "embed_tokens"], use_rslora=True),
        dict(target_modules=["v_proj"], modules_to_save=["lm_head"], use_dora=True),
    ],
)
def test_merged_weights_compute_what_the_adapted_model_does(options):
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model = copy.deepcopy(plain)
    model.add_adapter(peft.LoraConfig(r=2, **options))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
        wanted, before = model(ids).logits, plain(ids).logits
        kept = copy.deepcopy(model.state_dict())
        plain.load_state_dict(lora.merged_state_dict(model))
        found = plain(ids).logits
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())
